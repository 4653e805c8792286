"""Played hypervisors."""
