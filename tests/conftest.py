"""Property tests give the same examples on every run, and take the time they need on a busy machine."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("duet", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("duet")
