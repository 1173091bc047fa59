"""Hosts that filigrane works inside: one file each, none imported before it is asked for."""
