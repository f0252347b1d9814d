"""Times in a video as people write them."""

import re

TIME = r"(?:(?:(?:\d{1,6}:[0-5]\d|\d{1,6}):[0-5]\d|\d{1,9})(?:[.,]\d{1,9})?|[.,]\d{1,9})"
"""Pattern of what `parse_time` reads."""


def parse_time(text: str) -> float:
    """Returns the seconds that a time stands for.

    ```
    12.5   12.5        0:03   3        2:05.5   125.5        1:00:00,250   3600.25
    3:5    1:75        -1     nan      refused: minutes and seconds behind a colon have two digits
    ```

    Raises:
      ValueError: it is no such time.
    """
    if re.fullmatch(TIME, text, re.ASCII) is None:
        raise ValueError(f"{text!r} is no time; expected seconds, m:ss or h:mm:ss")
    seconds = 0.0
    for part in text.replace(",", ".").split(":"):
        seconds = 60 * seconds + float(part)
    return seconds
