"""Round-trip hints: what a dense checkpoint cannot say of the block format that it was decoded from.

`values` says what a hint is and where it lies, `keeping` plans to write them, `reading` finds them again. What is
done with them while a plan runs is `pipeline.hints`' and `pipeline.hint_files`'. docs/hints.md is the format.
"""
