"""Text that tells where private data lie: no release may hold any, so no class may have such a name."""

from __future__ import annotations

import re

# Two path components or more, so that closing tags and "1/N" don't count; storage addresses and home folders do.
_PRIVATE_PATH = re.compile(
    r"(?<![\w/.<])/[A-Za-z_][\w.-]*(?:/[\w.-]+)+|\b(?:s3|gs|file|hdfs|abfs)://[^\s\"'<]+|~/[\w.-]+|\b[A-Z]:\\\w+"
)


def private_paths(text: str) -> list[str]:
    """What looks like an absolute path or a storage address in a text, each once."""
    return sorted(set(_PRIVATE_PATH.findall(text)))
