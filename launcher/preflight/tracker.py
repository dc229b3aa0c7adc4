"""Checks before the launch whether the tracking server answers. It asks one port, for a moment only."""

import http.client
import urllib.error
import urllib.request

from gpt.config.run import RunConfig
from launcher.findings import Findings

_TIMEOUT_S = 1.0


def check_tracker(config: RunConfig, findings: Findings) -> None:
    """Warn when the tracking server does not answer; the sidecar then sends the record later."""
    uri = config.tracking.uri
    if not config.tracking.enabled or uri is None or not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_TIMEOUT_S).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        findings.warn(
            f"tracking.uri = {uri} does not answer from here ({reason}). Training goes on without it, and "
            "the metrics are sent once it answers."
        )
