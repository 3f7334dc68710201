"""LTX-Video, and LTX-2 with its audio: native and diffusers names."""

from __future__ import annotations

from collections.abc import Iterator

from .base import Family, Naming, Shapes, denoiser, layer, table
from .text import T5_ALONE

_BLOCK = "transformer_blocks.{}"
_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
_TIMES = {  # what the time step modulates
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}


def _alike(*names: str) -> Iterator[Naming]:
    for name in names:
        yield Naming(name, (name,))


ROWS = (
    *(
        row
        for attention in _ATTENTIONS
        for row in (
            *_alike(
                *(f"{_BLOCK}.{attention}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_gate_logits"))
            ),
            Naming(f"{_BLOCK}.{attention}.q_norm", (f"{_BLOCK}.{attention}.norm_q",)),
            Naming(f"{_BLOCK}.{attention}.k_norm", (f"{_BLOCK}.{attention}.norm_k",)),
        )
    ),
    *(
        Naming(f"{native}.{name}", (f"{diffusers}.{name}",))
        for native, diffusers in _TIMES.items()
        for name in ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")
    ),
    *(
        row
        for stream in ("", "audio_")
        for row in (
            Naming(f"{stream}patchify_proj", (f"{stream}proj_in",)),
            *_alike(
                f"{_BLOCK}.{stream}ff.net.0.proj",
                f"{_BLOCK}.{stream}ff.net.2",
                f"{stream}caption_projection.linear_1",
                f"{stream}caption_projection.linear_2",
                f"{stream}proj_out",
            ),
        )
    ),
)
PARAMETERS = {name: name for name in ("scale_shift_table", f"{_BLOCK}.scale_shift_table")}


def shapes() -> Shapes:
    """The weights of LTX-Video, 2B."""
    width = 2048
    found: dict[str, tuple[int, ...]] = {"scale_shift_table": (2, width)}
    found |= layer("patchify_proj", width, 128) | layer("proj_out", 128, width)
    found |= layer("adaln_single.linear", width * 6, width)
    for name, inputs in (("adaln_single.emb.timestep_embedder", 256), ("caption_projection", 4096)):
        found |= layer(f"{name}.linear_1", width, inputs) | layer(f"{name}.linear_2", width, width)
    for number in range(28):
        block = f"transformer_blocks.{number}"
        for attention in ("attn1", "attn2"):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                found |= layer(f"{block}.{attention}.{name}", width, width)
            found |= {f"{block}.{attention}.{name}_norm.weight": (width,) for name in "qk"}
        found |= layer(f"{block}.ff.net.0.proj", width * 4, width) | layer(f"{block}.ff.net.2", width, width * 4)
        found[f"{block}.scale_shift_table"] = (6, width)
    return found


LTX = Family(
    "ltx",
    "LTX-Video",
    components=(denoiser(table(ROWS), shapes, parameters=PARAMETERS), T5_ALONE),
    recognises=lambda shapes: "adaln_single.linear.weight" in shapes and "patchify_proj.weight" in shapes,
)
