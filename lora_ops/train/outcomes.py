"""Outcomes: what a run did, or would need, for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import shown


def trained(data: Mapping[str, Any]) -> str:
    """Of a Sitting's data."""
    lines = [f"✓ {shown(data['name'])}: step {data['step']} of {data['steps']}{_pace(data)}"]
    if data["smoothed"] is not None:
        lines += [f"   loss {data['smoothed']:.4g} (smoothed)"]
    if data["from_step"]:
        lines += [f"   went on from step {data['from_step']}"]
    if data["best"] is not None:
        lines += [f"   the held-out pictures were best at step {data['best']}"]
    lines += [f"   {data['places']} places of {shown(data['preset'])}, {data['parameters'] / 1e6:.2f} M parameters"]
    lines += [f"   in {shown(data['folder'])}", *(f"! {shown(note)}" for note in data["notes"])]
    return "\n".join(lines)


def rehearsed(data: Mapping[str, Any], steps: int) -> str:
    """Of a Course's rehearsal."""
    pictures, learned = data["activations"] / 1e9, data["parameters"] / 1e9
    lines = [
        f"A step takes {data['seconds']:.2f} s: {steps} steps take {clock(data['seconds'] * steps)}",
        f"   beside the model {pictures + learned:.2f} GB are needed, {data['free'] / 1e9:.2f} GB are free",
        f"   {pictures:.2f} GB for the pictures, {learned:.2f} GB for what is learned",
    ]
    return "\n".join(lines)


def clock(seconds: float) -> str:
    """12:05, or 3:12:05."""
    whole = round(seconds)
    minutes = f"{whole // 60 % 60:02}:{whole % 60:02}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02}"
    return f"{whole // 3600}:{minutes}" if whole >= 3600 else minutes


def _pace(data: Mapping[str, Any]) -> str:
    done = data["step"] - data["from_step"]
    return f" in {clock(data['seconds'])} ({data['seconds'] / done:.2f} s a step)" if done > 0 else ""
