"""Durable copies of sessions."""
