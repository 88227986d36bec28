"""Checks before a release: ``make release-check``. No part of what is released."""
