"""The problems and warnings that the checks before a launch have found, reported together."""

from dataclasses import dataclass, field


@dataclass
class Findings:
    """Problems prevent the launch; warnings are printed and the launch continues."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def problem(self, sentence: str | None) -> None:
        """Add a problem, unless it is None."""
        if sentence:
            self.problems.append(sentence)

    def warn(self, sentence: str | None) -> None:
        """Add a warning, unless it is None."""
        if sentence:
            self.warnings.append(sentence)
