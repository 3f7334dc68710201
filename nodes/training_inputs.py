"""The inputs of Train LoRA, in the order that is frozen: those that everybody sets, then the advanced ones."""

from __future__ import annotations

from typing import Any

from ..lora_ops.train.presets import AUTO, NAMES
from ..lora_ops.train.settings import Settings
from .host.api import io
from .host.names import listed
from .host.previews import SAMPLERS, SCHEDULERS
from .widgets import LoraDatasetType

DEFAULTS = Settings()
MOST = 1_000_000  # steps
INITIAL = ("gaussian", "orthogonal", "pissa_niter_16", "pissa", "olora", "eva")
OPTIONAL: dict[str, Any] = {"optional": True, "advanced": True}


def inputs() -> list[io.Input]:
    return [*_wires(), *_basic(), *_advanced()]


def _wires() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The model to train on, with what is on it; it stays as it is."),
        LoraDatasetType.Input("dataset", tooltip="What to learn from, from Training Dataset."),
        io.Clip.Input("clip", optional=True, tooltip="The text encoder: for sample_prompts, and to train it too."),
        io.Vae.Input(
            "vae", optional=True, tooltip="Makes pictures of the samples. Without it they are ComfyUI's rough previews."
        ),
        io.Conditioning.Input(
            "sample_positive",
            optional=True,
            tooltip="Conditionings to draw a sample of each, one or a list, beside those of sample_prompts.",
        ),
        io.Conditioning.Input(
            "sample_negative",
            optional=True,
            tooltip="The negative conditioning of all samples, or a list with one for each. Without it: no text.",
        ),
    ]


def _basic() -> list[io.Input]:
    return [
        io.Combo.Input(
            "preset",
            options=list(NAMES),
            tooltip="Whose recommendations hold where something is auto: timesteps, weighting, guidance. auto: those "
            "of the model's own family. A family that the model is not of is refused.",
        ),
        io.String.Input(
            "name",
            default="my_lora",
            tooltip="The run's name, and its folder's: output/lora_ops/NAME holds states, LoRAs and samples. "
            "%date:yyyy-MM-dd% and %Node title.input% stand for the date and for a value in the graph.",
        ),
        _int("steps", 1, MOST, "How often the LoRA is moved. 500 to 3000; a finished run goes on if you raise it."),
        _int("batch", 1, 1024, "Pictures computed at once. More is steadier and takes more memory."),
        _int("accumulation", 1, 1024, "Batches in a step: as steady as a larger batch, without its memory."),
        _float(
            "learning_rate",
            0.0,
            10.0,
            0.000001,
            "How far a step moves. 0.00005 to 0.0005 with AdamW, a tenth of that with Lion, 1 with Prodigy.",
        ),
        _int(
            "rank",
            1,
            4096,
            "How much the LoRA can hold, and how large it gets. 4 to 64. For OFT: the size of a block, which must "
            "divide a weight's inputs.",
        ),
        _float(
            "alpha",
            0.0001,
            65536.0,
            0.5,
            "The update is multiplied with alpha / rank (rs-lora: with alpha / √rank). The same as rank is 1. "
            "OFT has none: leave it at rank.",
        ),
        _choice(
            "targets",
            {
                "attention": [],
                "attention and mlp": [],
                "all": [],
                "selectors": [
                    io.String.Input(
                        "selectors",
                        multiline=True,
                        default="role:attn, role:mlp=8",
                        tooltip="Places as in a LoRA stack's blocks, each with its rank: role:attn=16, "
                        "double_blocks.0-9=8, *.to_k=0. Without a rank: the one above; 0 leaves a place out. Of "
                        "several that mean a place the last counts. alpha keeps its ratio to rank.",
                    )
                ],
            },
            "What of the model learns. attention: its projections, as diffusers does. attention and mlp: the blocks' "
            "matrices. all: every matrix and convolution. selectors: what you write.",
        ),
        _choice(
            "adapter",
            {"lora": _initial(), "rs-lora": _initial(), "dora": [], "lokr": [], "loha": [], "oft": []},
            "What is learned. lora: two thin matrices. rs-lora: the same, scaled so that high ranks learn. dora: and a "
            "length for each row. lokr, loha: products that say more in less. oft: a rotation of the inputs.",
        ),
        _choice(
            "optimizer",
            {
                "adamw": [_decay(), _lora_plus()],
                "adamw8bit": [_decay(), _lora_plus()],
                "prodigy": [_decay(), _d_coef()],
                "schedule_free": [_decay(), _lora_plus()],
                "lion": [_decay(), _lora_plus()],
                "adafactor": [_decay(), _lora_plus()],
            },
            "What turns gradients into steps. adamw suits most. prodigy finds the rate itself: set learning_rate to 1. "
            "All but adamw and adafactor are packages of their own, named if they are missing.",
        ),
        _choice(
            "objective",
            {
                "auto": [],
                "constant": [],
                "min-snr": [_nested_float("gamma", 5.0, 0.1, 100.0, 0.1, "Where it begins to hold back. 5 is usual.")],
                "debiased": [],
            },
            "What an error costs at each noise level. What the model should answer (noise, v, velocity) is its own. "
            "auto: the preset's. min-snr and debiased are for models of noise and v; flow models refuse them.",
        ),
        _choice(
            "text_encoder",
            {"off": [], "on": [_text_rate()], "with t5": [_text_rate()]},
            "on: CLIP learns too, with the dataset's captions. with t5: and T5 (SD3, FLUX.1, Chroma), which is large. "
            "Connect clip.",
        ),
        io.String.Input(
            "sample_prompts",
            multiline=True,
            default=DEFAULTS.sample_prompts,
            tooltip="Prompts to draw a sample of each, one a line; lines may end in `--n what to avoid`. Connect clip.",
        ),
        _int("sample_every", 0, MOST, "Draw samples every so many steps and at the end. 0: never."),
        _int("save_every", 0, MOST, "Save the LoRA and the run's state every so many steps. 0: at the end only."),
        _choice(
            "resume",
            {
                "auto": [],
                "none": [],
                "lora": [
                    io.Combo.Input(
                        "file",
                        options=listed(),
                        tooltip="A LoRA of models/loras, of any trainer, with the rank and places of this run.",
                    )
                ],
            },
            "auto: go on with the run of this name, if there is one. none: begin anew; the folder of an earlier run is "
            "kept under another name. lora: begin with a LoRA's weights.",
        ),
        io.Int.Input(
            "seed",
            default=DEFAULTS.seed,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=False,
            tooltip="Of all that is random in the run: the same seed gives the same LoRA. A run resumes with its own.",
        ),
    ]


def _advanced() -> list[io.Input]:
    """Optional, so that a prompt sent to the API may leave them out."""
    return [
        _choice(
            "schedule",
            {
                "constant": [_warmup()],
                "linear": [_warmup()],
                "cosine": [_warmup()],
                "cosine_with_restarts": [_warmup(), _nested_int("cycles", 2, 1, 1000, "How often it starts anew.")],
                "polynomial": [
                    _warmup(),
                    _nested_float("power", 1.0, 0.1, 10.0, 0.1, "1 is a line, 2 a parabola.", advanced=True),
                ],
            },
            "How the learning rate goes on over the steps; all but constant end at 0.",
            **OPTIONAL,
        ),
        _choice(
            "loss",
            {
                "mse": [],
                "huber": [
                    _nested_float(
                        "huber_c", 0.1, 0.0001, 1.0, 0.01, "Where the square bends into a line.", advanced=True
                    ),
                    io.Combo.Input(
                        "huber_schedule",
                        options=["snr", "constant"],
                        tooltip="snr: it bends later where there is little noise. constant: the same everywhere.",
                        advanced=True,
                    ),
                ],
                "l1": [],
            },
            "How an error is measured. huber and l1 weigh outliers less: pictures that do not fit the others.",
            **OPTIONAL,
        ),
        _choice(
            "timesteps",
            {
                "auto": [],
                "uniform": [_shift()],
                "logit-normal": [
                    _nested_float("mean", 0.0, -5.0, 5.0, 0.1, "Above 0: more noise more often.", advanced=True),
                    _nested_float("deviation", 1.0, 0.01, 10.0, 0.1, "How widely it is spread.", advanced=True),
                    _shift(),
                ],
            },
            "Which noise levels are trained how often. auto: the preset's.",
            **OPTIONAL,
        ),
        _int("sample_width", 0, 16384, "Of samples, in pixels. 0: as the first picture.", step=8, **OPTIONAL),
        _int("sample_height", 0, 16384, "Of samples, in pixels. 0: as the first picture.", step=8, **OPTIONAL),
        _int("sample_steps", 1, 1000, "The sampler's steps.", **OPTIONAL),
        _float("sample_cfg", 0.0, 100.0, 0.1, "0: the preset's; 1: without the negative, twice as fast.", **OPTIONAL),
        io.Combo.Input(
            "sample_sampler",
            options=list(SAMPLERS),
            default=DEFAULTS.sample_sampler,
            tooltip="ComfyUI's own, which draws the samples.",
            **OPTIONAL,
        ),
        io.Combo.Input(
            "sample_scheduler",
            options=[AUTO, *SCHEDULERS],
            default=DEFAULTS.sample_scheduler,
            tooltip="Which noise levels it goes through. auto: the preset's.",
            **OPTIONAL,
        ),
        _int("sample_seed", 0, 0xFFFFFFFFFFFFFFFF, "Of samples, always the same: so they can be compared.", **OPTIONAL),
        io.Combo.Input(
            "precision",
            options=["auto", "bf16"],
            default=DEFAULTS.precision,
            tooltip="auto: as the model computes. bf16: half the memory for what is kept of a forward pass. The LoRA "
            "itself is float32.",
            **OPTIONAL,
        ),
        io.Boolean.Input(
            "checkpointing",
            default=DEFAULTS.checkpointing,
            tooltip="Computes each block again in the backward pass instead of keeping it: far less memory, a third "
            "more time.",
            **OPTIONAL,
        ),
        _float(
            "ema",
            0.0,
            0.99999,
            0.001,
            "The past's share in an average of the steps, which is the result. 0: the last step.",
            **OPTIONAL,
        ),
        _float(
            "dropout",
            0.0,
            0.99,
            0.01,
            "The share of a LoRA's inputs that each step leaves out, against learning by heart.",
            **OPTIONAL,
        ),
        _float("clip_norm", 0.0, 1000.0, 0.1, "Longer gradients are shortened to this. 0: none.", **OPTIONAL),
        _float(
            "noise_offset",
            0.0,
            1.0,
            0.01,
            "Noise of one value for a whole channel: for very dark and bright pictures. 0.03 to 0.1.",
            **OPTIONAL,
        ),
        _float(
            "guidance",
            0.0,
            100.0,
            0.1,
            "What a guidance-distilled model is told while it trains. 0: the preset's.",
            **OPTIONAL,
        ),
        io.Boolean.Input(
            "masked",
            default=DEFAULTS.masked,
            tooltip="Whether the dataset's masks say where to learn. Without masks it changes nothing.",
            **OPTIONAL,
        ),
        _int(
            "validate_every",
            0,
            MOST,
            "Look at the dataset's held-out pictures every so many steps. 0: never.",
            **OPTIONAL,
        ),
        io.Boolean.Input(
            "dry_run",
            default=DEFAULTS.dry_run,
            tooltip="Measures one step and tells memory and time; trains and writes nothing.",
            **OPTIONAL,
        ),
        _choice(
            "preservation",
            {
                "off": [],
                "class word": [
                    io.String.Input(
                        "class_word",
                        default="",
                        tooltip="What stands for the trigger word: dog for a certain dog. Empty: captions without the "
                        "trigger word, for a style.",
                    ),
                    io.String.Input(
                        "trigger_word",
                        default="",
                        tooltip="The word of the captions that means what is learned. Empty: the data set's.",
                    ),
                    _nested_float(
                        "weight", 1.0, 0.01, 100.0, 0.05, "How much it counts beside the pictures (1: as much)."
                    ),
                ],
                "regularisation pictures": [],
            },
            "Keeps what the model makes of other prompts: what it answers without the LoRA is learned too. class word: "
            "to each picture's caption with a class word for its trigger word, in the same step, which takes 2 to 3 "
            "times as long; connect clip. regularisation pictures: to those of the data set, instead of the pictures.",
            **OPTIONAL,
        ),
        io.Boolean.Input(
            "offload",
            default=DEFAULTS.offload,
            tooltip="Keeps the model's weights in main memory and brings each block to the GPU while the one before it "
            "runs: for models larger than the GPU's memory. Slower. ComfyUI's dynamic VRAM does so by itself.",
            **OPTIONAL,
        ),
        io.Boolean.Input(
            "compile",
            default=DEFAULTS.compile,
            tooltip="Runs the model's blocks through torch.compile: the first step takes minutes, those after it less "
            "time. Needs a C++ compiler, on a GPU Triton. Not with dropout.",
            **OPTIONAL,
        ),
    ]


def _int(name: str, low: int, high: int, tooltip: str, **more: Any) -> io.Input:
    default = getattr(DEFAULTS, name)
    return io.Int.Input(name, default=default, min=low, max=high, control_after_generate=False, tooltip=tooltip, **more)


def _float(name: str, low: float, high: float, step: float, tooltip: str, **more: Any) -> io.Input:
    return _nested_float(name, getattr(DEFAULTS, name), low, high, step, tooltip, **more)


def _nested_int(name: str, default: int, low: int, high: int, tooltip: str) -> io.Input:
    return io.Int.Input(name, default=default, min=low, max=high, tooltip=tooltip, advanced=True)


def _nested_float(
    name: str, default: float, low: float, high: float, step: float, tooltip: str, **more: Any
) -> io.Input:
    return io.Float.Input(name, default=default, min=low, max=high, step=step, round=step / 10, tooltip=tooltip, **more)


def _choice(
    name: str, options: dict[str, list[io.Input]], tooltip: str, *, optional: bool = False, advanced: bool = False
) -> io.Input:
    return io.DynamicCombo.Input(
        name,
        options=[io.DynamicCombo.Option(key, there) for key, there in options.items()],
        optional=optional,
        tooltip=tooltip,
        extra_dict={"advanced": True} if advanced else None,
    )


def _text_rate() -> io.Input:
    return _nested_float("learning_rate", 0.000005, 0.0, 10.0, 0.000001, "Its own; usually far below the model's.")


def _initial() -> list[io.Input]:
    return [
        io.Combo.Input(
            "initial",
            options=list(INITIAL),
            tooltip="What the LoRA begins with. gaussian: nothing yet. pissa, olora: the weight's largest parts "
            "(pissa_niter_16: the same quickly), taken off again, so that the file has twice the rank. orthogonal; "
            "eva: the directions that the pictures' inputs have.",
            advanced=True,
        )
    ]


def _decay() -> io.Input:
    return _nested_float(
        "weight_decay", 0.01, 0.0, 10.0, 0.001, "Draws the factors towards 0. 0 to 0.1.", advanced=True
    )


def _lora_plus() -> io.Input:
    return _nested_float(
        "lora_plus",
        1.0,
        0.01,
        100.0,
        0.5,
        "How much faster up learns than down (LoRA+): 1 is off, 16 is its paper's.",
        advanced=True,
    )


def _d_coef() -> io.Input:
    return _nested_float(
        "d_coef", 1.0, 0.01, 100.0, 0.1, "A factor on the rate that it finds. 0.5 to 2.", advanced=True
    )


def _warmup() -> io.Input:
    return _nested_int("warmup", 0, 0, MOST, "Steps in which the rate grows from 0.")


def _shift() -> io.Input:
    return _nested_float(
        "shift",
        0.0,
        0.0,
        100.0,
        0.1,
        "Towards more noise, above 1. 0: the model's own. For flow models.",
        advanced=True,
    )
