"""Previews: pictures that the host's own sampler draws with a model while it learns."""

from __future__ import annotations

import comfy.samplers

SAMPLERS = tuple(comfy.samplers.SAMPLER_NAMES)
SCHEDULERS = tuple(comfy.samplers.SCHEDULER_NAMES)
