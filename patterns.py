"""
Regular expressions that users bring: checked when they are read, and searched under a time limit.

A pattern like (a+)+$ can take longer than the universe has, and Python's re cannot be told to stop.
So the search runs in a process of its own, which is killed when its time is up.
"""
import json
import re
import subprocess
import sys

from files import InputError

SECONDS = 30  # for all answers of a condition, which take milliseconds; starting Python is in it
LONGEST = 2000  # characters of a pattern: every answer is sent with its own
SEARCH = """
import json, re, sys
for pattern, text in json.load(sys.stdin):
    print(int(re.search(pattern, text, re.IGNORECASE) is not None), flush=True)
"""


def problem(pattern):
    """What is wrong with a regular expression, or None."""
    if len(pattern) > LONGEST:
        return f"has {len(pattern)} characters where {LONGEST} are the most; give a shorter one"
    try:
        re.compile(pattern, re.IGNORECASE)
    except (re.error, RecursionError, OverflowError) as e:
        return f"is no regular expression ({e}); correct it, or put a \\ before a sign meant as such"
    return None


def search(pairs):
    """
    [bool] for pairs (pattern, text): does the pattern occur in the text, case aside? Raises
    InputError naming the pattern that has not come to an end when SECONDS are over.
    """
    if not pairs:
        return []
    command = [sys.executable, "-I", "-S", "-c", SEARCH]
    try:
        done = subprocess.run(command, input=json.dumps(pairs).encode(), timeout=SECONDS,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        answered, why = done.stdout.split(), f"failed ({done.stderr.decode()[-200:].strip()})"
    except subprocess.TimeoutExpired as e:
        answered, why = (e.stdout or b"").split(), f"did not come to an end in {SECONDS} s"
    if len(answered) < len(pairs):
        pattern, text = pairs[len(answered)]
        raise InputError(f"the pattern {pattern!r} {why} on {text[:60]!r}; write it without a "
                         "repetition inside a repetition")
    return [word == b"1" for word in answered]
