"""Publishing on the Hub: files go to one draft pull request as they become whole, and it is merged when all are there.

So `main` shows a whole model or what it showed before. Owns the pull request, what was sent, and the model card. It
refuses to own how files are made (`pipeline/`).

    draft pull request      shards, a commit each, while others are made
                            small files, then the card and what it replaces
    checked, opened, merged

What the Hub has is asked of the Hub: a file counts as sent when the pull request's tree has its digest.
"""

from __future__ import annotations
