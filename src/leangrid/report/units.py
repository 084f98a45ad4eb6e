"""Bytes and seconds as people read them."""

_UNITS = ("B", "kB", "MB", "GB", "TB")


def format_size(count: int | float) -> str:
    """A number of bytes such as 3.2 GB, in powers of 1000."""
    step = 0
    while abs(count) >= 1000 and step < len(_UNITS) - 1:
        count, step = count / 1000, step + 1
    return f"{count:.0f} {_UNITS[step]}" if step == 0 else f"{count:.1f} {_UNITS[step]}"


def format_duration(seconds: int | float) -> str:
    """Seconds such as 42 s, 3 min 05 s, 2 h 10 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
