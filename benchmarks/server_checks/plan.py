"""List the checks of servers.py in their order: what others read first, then arithmetic, quality and cost."""

from server_checks import quality, served, stream

CHECKS = (*served.list_checks(), *quality.list_checks(), *stream.list_checks())
