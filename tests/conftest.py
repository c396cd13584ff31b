"""What holds for every test: none fails because the machine is slow."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("meshctl", deadline=None)
settings.load_profile("meshctl")
