"""A launch that preflight has accepted, as the commands pass it on."""

from dataclasses import dataclass

from data_pipeline.dataset.manifest import Manifest
from gpt.config.run import RunConfig
from launcher.cluster import ClusterConfig


@dataclass(frozen=True)
class Request:
    """The resolved config, the cluster, the data and the warnings of a launch that may start."""

    config: RunConfig
    cluster: ClusterConfig
    manifests: tuple[Manifest, ...]
    warnings: tuple[str, ...]

    @property
    def train_tokens(self) -> tuple[int, ...]:
        """Training tokens per source."""
        return tuple(manifest.train_tokens for manifest in self.manifests)
