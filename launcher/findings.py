"""What the checks before a launch have found. They collect everything, so that the user sees it at once."""

from dataclasses import dataclass, field


@dataclass
class Findings:
    """Problems prevent the launch; warnings are shown, and the launch goes on."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def problem(self, sentence: str | None) -> None:
        """Add a problem, if `sentence` is one."""
        if sentence:
            self.problems.append(sentence)

    def warn(self, sentence: str | None) -> None:
        """Add a warning, if `sentence` is one."""
        if sentence:
            self.warnings.append(sentence)
