"""The doors and the switchboard; the only room that knows text."""
