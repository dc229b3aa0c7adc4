"""A launch that preflight has accepted: what the commands hand to each other."""

from dataclasses import dataclass

from data_pipeline.dataset.manifest import Manifest
from gpt.config.run import RunConfig
from launcher.cluster import ClusterConfig


@dataclass(frozen=True)
class Request:
    """A launch that may start: the resolved config, where it runs, what it reads, what to warn of."""

    config: RunConfig
    cluster: ClusterConfig
    manifests: tuple[Manifest, ...]
    warnings: tuple[str, ...]

    @property
    def train_tokens(self) -> tuple[int, ...]:
        """Tokens of each source's training data."""
        return tuple(manifest.train_tokens for manifest in self.manifests)
