"""What a user can put right."""


class Mistake(ValueError):
    """In the arguments or the text: it says what to change, and ends a command with exit code 2, not a traceback."""
