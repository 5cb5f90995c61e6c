"""Prints what pip must install for one of the project's extras, without the project itself.

Owns nothing; reads pyproject.toml, which is the one place where dependencies stand.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

if __name__ == "__main__":
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    print(*project["dependencies"], *project["optional-dependencies"][sys.argv[1]], sep="\n")
