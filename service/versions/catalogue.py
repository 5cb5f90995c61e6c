"""What is served, by name and version: the lookups that every request begins with.

Owns the table of versions and what callers are told of those that are not served. Must not know how a version comes or
goes, grpc, or sessions.
"""

from __future__ import annotations

from collections.abc import Iterator

from service.errors import Loading, ModelUnknown
from service.ticks.runner import Runner
from service.versions.version import Entry, Version


class Catalogue:
    """All versions of all models that are known."""

    def __init__(self) -> None:
        self._models: dict[str, dict[int, Version]] = {}
        self._started = False

    def names(self) -> list[str]:
        """The models that take new work, in alphabetical order.

        Raises:
            Loading: if the server is starting still.
        """
        self._be_started()
        return sorted(name for name in self._models if self.versions(name))

    def versions(self, name: str) -> list[int]:
        """The versions of a model that take new work, in order."""
        return sorted(number for number, version in self._models.get(name, {}).items() if version.serving is not None)

    def ready(self, name: str, version: int = 0) -> bool:
        """Whether a model takes new work, in the given version or, for 0, in any."""
        return version in self.versions(name) if version else bool(self.versions(name))

    def find(self, name: str, version: int = 0) -> Runner:
        """Look up the runner that takes a model's new work.

        Args:
            name: of the model.
            version: of it; 0 for the newest.

        Raises:
            ModelUnknown: if there is none; the text says why not.
            Loading: if there will be one shortly.
        """
        self._be_started()
        known = self._models.get(name, {})
        serving = self.versions(name)
        if serving and version in (0, *serving):
            runner = known[version or serving[-1]].serving
            assert runner is not None
            return runner
        meant = [known[number] for number in sorted(known) if version in (0, number)]
        if any(one.loading for one in meant):
            raise Loading(f"model {name!r} is being loaded; try again in a moment")
        if not known:
            raise ModelUnknown(f"no model {name[:128]!r} is served; there are: {', '.join(self.names()) or 'none'}")
        there_are = f"there are: {', '.join(map(str, serving)) or 'none'}"
        if not meant:
            raise ModelUnknown(f"model {name!r} has no version {version} here; {there_are}")
        if not version:
            raise ModelUnknown(f"model {name!r} {meant[-1].refusal}")
        raise ModelUnknown(f"version {version} of model {name!r} {meant[-1].refusal}; {there_are}")

    def find_for_session(self, name: str, version: int) -> Runner:
        """Look up a runner on which a session of an earlier process may go on, also if it takes no new ones.

        Raises:
            ModelUnknown: if there is none; the text says why not.
        """
        known = self._models.get(name, {}).get(version)
        return known.runners[0] if known is not None and known.runners else self.find(name, version)

    def index(self) -> list[Entry]:
        """Every version that is known, in order of name and number."""
        return sorted(version.entry() for version in self._every())

    def __iter__(self) -> Iterator[Runner]:
        """Go through all runners, also those that take no new work."""
        return (runner for version in self._every() for runner in version.runners)

    def _every(self) -> Iterator[Version]:
        return (version for versions in self._models.values() for version in versions.values())

    def _be_started(self) -> None:
        if not self._started:
            raise Loading("models are being loaded")
