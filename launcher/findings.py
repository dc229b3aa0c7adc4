"""What checks before a launch have found: all of it, told at once."""

from dataclasses import dataclass, field


@dataclass
class Findings:
    """Problems forbid the launch; warnings are shown and it goes on."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def problem(self, sentence: str | None) -> None:
        """Add a problem where there is one."""
        if sentence:
            self.problems.append(sentence)

    def warn(self, sentence: str | None) -> None:
        """Add a warning where there is one."""
        if sentence:
            self.warnings.append(sentence)
