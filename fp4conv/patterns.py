"""Regular expressions that come from files: used only where matching them cannot take forever; and names as globs.

Python's `re` backtracks: 'a*a*a*a*b' or '(a|a)(a|a)...' on a name of a hundred characters does not end. So a pattern is
taken when the ways to match it are few, as they are for every pattern that names modules of a model.
"""

from __future__ import annotations

import glob
import re
import shlex

LONGEST_PATTERN = 1_000
LONGEST_NAME = 250  # names that patterns are matched with; those of models have about a hundred characters
_MOST_WAYS = 400_000_000  # three repetitions behind a prefix that may be anything: seconds on a name made for it
_UNREAD = re.compile(r"\(\?(#|[a-zA-Z]*x)")  # remarks and verbose patterns, which hide what a repetition repeats
_WAYS_OF_REPEAT = 100  # about the length of a name


def compile_bounded(pattern: str) -> re.Pattern[str]:
    """`pattern` compiled; ValueError where it is none, or could take too long to match."""
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"it has {len(pattern):,} characters, at most {LONGEST_PATTERN:,} are taken")
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no regular expression: {error}") from error
    if _UNREAD.search(pattern) or _ways(pattern) > _MOST_WAYS:
        raise ValueError("it has so many repetitions or alternatives that matching it could take forever")
    return compiled


def matches(pattern: re.Pattern[str], name: str) -> bool:
    """Whether `pattern` matches at the start of `name`. A name longer than LONGEST_NAME is matched by none."""
    return len(name) <= LONGEST_NAME and pattern.match(name) is not None


def _ways(pattern: str) -> float:
    """About how many ways a matcher may have to try; infinite for a repetition of what itself has a choice."""
    # escapes and sets count as one character
    text = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL)
    text = re.sub(r"\(\?(P<\w+>|P=\w+|[aiLmsux-]*:|<?[=!]|>)?", "(", text)
    tokens = re.findall(r"\{[0-9]*,?[0-9]*\}[?+]?|[*+][?+]?|\?[?+]?|[()|]|[^*+?{()|]|\{", text)
    ways, branches = [1.0], [1]  # of each open group
    closed = 1.0  # choices in what a quantifier would repeat
    for token in tokens:
        if token == "(":
            ways.append(1.0)
            branches.append(1)
        elif token == "|":
            branches[-1] += 1
            closed = 1.0
        elif token == ")" and len(ways) > 1:
            inside, count = ways.pop(), branches.pop()
            closed = inside * count
            ways[-1] *= closed
        elif token[0] in "*+?" or len(token) > 1:
            if closed > 1 and token[0] != "?":
                return float("inf")
            ways[-1] *= 2 if token[0] == "?" else _WAYS_OF_REPEAT
            closed = 1.0
        else:
            closed = 1.0
    return ways[0] * branches[0]


def exclude(name: str) -> str:
    """The words for a shell that exclude the module `name` and no other."""
    glob_of_it = glob.escape(name)
    return f"--exclude {shlex.quote(glob_of_it)}" if "'" in name else f"--exclude '{glob_of_it}'"
