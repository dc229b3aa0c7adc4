"""Numbers as people read them: bytes, durations, counts."""


def size(count: float) -> str:
    """Bytes with a binary unit: 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds as a clock shows them: 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def processes(count: int) -> str:
    """A number of processes, with the noun in singular or plural."""
    return f"{count} process" if count == 1 else f"{count} processes"
