"""Numbers as short texts for the page."""


def duration(seconds: float | None) -> str:
    """Returns a duration such as "14 s", "3 min" or "2 h 10 min", "" for None."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def file_size(count: int | None) -> str:
    """Returns a number of bytes such as "3 kB", "24.1 MB" or "1.2 GB", "" for None."""
    if count is None:
        return ""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    if count >= 1e5:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e3:.0f} kB"


def short_number(number: int) -> str:
    """Returns a number such as "12.8 M" or "31 k"."""
    if number >= 1e5:
        return f"{number / 1e6:.1f} M"
    if number >= 1000:
        return f"{number / 1e3:.0f} k"
    return str(number)
