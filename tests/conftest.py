"""What all tests share: how many examples hypothesis draws. `make test-all` asks for the thorough profile."""

from __future__ import annotations

from hypothesis import settings

# Property tests state what is true, not how fast: a busy machine must not fail them.
settings.register_profile("fast", deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=150)
settings.load_profile("fast")
