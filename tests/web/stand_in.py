"""Nodes of the host that stand for others.

LoraOpsStandIn trains nothing: it tells of steps as training does, as far as a test lets it go, where only what is seen
of a run matters. Its state is a number in a file. LoraOpsStandInPictures has latents and conditionings for the small
world's FLUX without any VAE or CLIP.
"""

import math
import random
import sys
import time

import comfy.model_management
import torch
from aiohttp import web
from PIL import Image, ImageDraw
from server import PromptServer

EVERY = 20  # steps from one sample, save and look at held-out pictures to the next
ROUTE = "/lora_ops_stand_in/"
allowed = 0


@PromptServer.instance.routes.post(ROUTE + "{step}")
async def allow(request):
    """Lets it go as far as this step."""
    global allowed
    allowed = int(request.match_info["step"])
    return web.json_response({})


def ours(name):
    """A module of the pack, under whatever name the host gave the pack."""
    return next(module for key, module in list(sys.modules.items()) if key.endswith(f".{name}"))


class StandIn:
    CATEGORY = "test"
    FUNCTION = "train"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"name": ("STRING", {"default": "ink"}), "steps": ("INT", {"default": 100, "max": 100000})},
            "hidden": {"node": "UNIQUE_ID", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def IS_CHANGED(cls, **inputs):
        return math.nan

    def train(self, name, steps, node, extra_pnginfo):
        runs, progress = ours("nodes.host.runs"), ours("lora_ops.train.loop").Progress
        folder = runs.root() / name
        run = runs.begin(node, name, steps, folder, runs.workflow_of(extra_pnginfo))
        state = folder / "state"
        step = int(state.read_text()) if state.exists() else 0
        smoothed, best = loss_of(step + 1), math.inf

        def save(better=False):
            path = folder / f"{name}-{step:06}.safetensors"
            path.write_bytes(b"")
            state.write_text(str(step))
            run.saved(step, path, better)

        try:
            while step < steps:
                comfy.model_management.throw_exception_if_processing_interrupted()
                wanted = run.wanted()
                if "sample" in wanted:
                    run.sampled(step, pictures(step))
                if "save" in wanted:
                    save()
                if "finish" in wanted:
                    run.ended("finished", f"Finished early at step {step}: {name}.safetensors is in output/lora_ops.")
                    return ("",)
                if step >= allowed:
                    time.sleep(0.01)
                    continue
                step += 1
                loss, due = loss_of(step), step % EVERY == 0
                smoothed = 0.95 * smoothed + 0.05 * loss
                validation = 0.06 + 0.4 * math.exp(-step / 60) + 0.0003 * step if due else None
                better = validation is not None and validation < best
                best = min(best, validation or best)
                if due:
                    save(better)
                run.stepped(progress(step, steps, loss, smoothed, 1e-4, 0.52, validation, better), 11_200_000_000)
                if due:
                    run.sampled(step, pictures(step))
        except BaseException:
            save()
            run.ended("cancelled", f"Cancelled at step {step}. Queue the node again to go on from there.")
            raise
        run.ended("done", f"{name}.safetensors is in output/lora_ops/{name}.")
        return ("",)


def loss_of(step):
    noise = random.Random(step)
    return (0.05 + 0.4 * math.exp(-step / 80)) * (0.6 + 0.8 * noise.random() + (3 * noise.random() ** 30))


def pictures(step):
    found = []
    for number in range(2):
        image = Image.new("RGB", (256, 256), ((40, 70, 120), (150, 80, 60))[number])
        draw = ImageDraw.Draw(image)
        reach = 20 + min(90, step)
        draw.ellipse((128 - reach, 128 - reach, 128 + reach, 128 + reach), fill=(240, 200, min(255, 60 + step)))
        found.append(image)
    return found


class Pictures:
    CATEGORY = "test"
    FUNCTION = "made"
    RETURN_TYPES = ("LATENT", "CONDITIONING")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def made(self):
        draws = torch.Generator().manual_seed(0)
        latent, tokens, pooled = (
            torch.randn(shape, generator=draws) for shape in ((1, 16, 12, 12), (1, 77, 768), (1, 768))
        )
        return {"samples": latent}, [[tokens, {"pooled_output": pooled}]]


NODE_CLASS_MAPPINGS = {"LoraOpsStandIn": StandIn, "LoraOpsStandInPictures": Pictures}
