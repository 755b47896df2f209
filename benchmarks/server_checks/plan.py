"""List the checks of servers.py in their order: what others read first, then arithmetic, quality and cost."""

from server_checks import quality, served

CHECKS = (*served.list_checks(), *quality.list_checks())
