"""The routes of the service; every module has a `router`."""
