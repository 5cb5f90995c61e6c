"""The Conveyor server."""
