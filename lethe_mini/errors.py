"""The one exception for what a user can mend: a bad path, a bad value, a broken checkpoint.

Its message is a single line that says what is wrong and how to mend it; the command line prints it
and exits with code 2. Anything else that escapes is a bug in lethe-mini and keeps its traceback.
"""


class UserError(ValueError):
    pass
