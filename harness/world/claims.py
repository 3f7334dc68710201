"""What is said of LoRAs, measured on the small world: figures as JSON, a page and pictures.

Each claim is a function of a Lab; those that train take minutes in all.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from bench.report import machine

from . import graph, pictures, reading
from .lab import ANSWERS, Lab, Marks, Shot, changes, class_word, frame, framed, has_frame, relative
from .pictures import Scene

RANKS = (1, 8, 32)
CUTS = (1, 2, 4, 8, 16, 32)
RANK = 8  # where nothing else is said
STRENGTHS = (0.0, 0.5, 1.0, 2.0, 4.0)
TARGETS: Mapping[str, tuple[str, ...]] = {
    "queries and keys": ("*.to_q", "*.to_k", "*.add_q_proj", "*.add_k_proj"),
    "attention's projections (default)": (),
    "MLPs": ("*_mlp.*", "*.proj_mlp", "*.linear2"),
    "all weights": ("*",),
}
WEIGHTS = (0.5, 1.0, 2.0)  # of a class word
KNOWN = {"colour": "red", "shape": "circle"}  # a figure that the base can paint, by a scene's fields
SHOWN = 10  # pictures in a row
COUNT = 8  # of each kind, drawn through the graph
GRAPH: Mapping[str, Any] = {  # Train LoRA's inputs
    **{"targets": "all", "rank": RANK, "alpha": float(RANK), "batch": 4, "learning_rate": 4e-3, "sample_every": 0},
    **{"schedule": "cosine", "schedule.warmup": 10, "precision": "bf16", "timesteps": "logit-normal"},
    **{"timesteps.mean": 0.4, "timesteps.deviation": 1.2, "timesteps.shift": 1.0},
}


@dataclass(frozen=True)
class Claim:
    says: str
    found: str
    holds: bool
    rows: Sequence[Mapping[str, Any]]
    sheet: Sequence[Sequence[Tensor]] = ()  # rows of pictures
    about: Sequence[str] = ()  # each row of them


class Study:
    """The lab, and the LoRAs that several claims look at, each learned once."""

    def __init__(self, comfy: Path, steps: int) -> None:
        self.lab, self.steps = Lab(comfy), steps
        self._learned: dict[str, tuple[Any, float]] = {}
        self._base: tuple[Marks, list[Tensor], list[Tensor]] | None = None

    @property
    def base(self) -> tuple[Marks, list[Tensor], list[Tensor]]:
        if self._base is None:
            self._base = self.lab.judged(self.lab.base)
        return self._base

    def zorp(self, **options: Any) -> Any:
        """A LoRA of 20 zorps."""
        return self.timed(**options)[0]

    def timed(self, **options: Any) -> tuple[Any, float]:
        """The same, and the CPU seconds it took."""
        key = repr(sorted(options.items()))
        if key not in self._learned:
            before = time.process_time()
            shots = self.lab.shots(self.lab.learned)
            self._learned[key] = self.lab.learn(shots, steps=self.steps, **options), time.process_time() - before
            print(f"  learned {options} in {time.process_time() - before:.0f} CPU s", flush=True)
        return self._learned[key]


def told(marks: Marks) -> dict[str, str]:
    return {
        "zorps": f"{marks.zorps:.0%}",
        "their place": f"{marks.places:.0%}",
        "their ground": f"{marks.grounds:.0%}",
        "other captions": f"{marks.others:.0%}",
    }


def base(study: Study) -> Claim:
    lab = study.lab
    rows, sheet, found = [], [], {}
    for name, scenes in zip(("trained on", "never seen"), pictures.split(), strict=True):
        chosen = random.Random(0).sample(scenes, 40)
        shown = lab.draw(lab.base, chosen)
        found[name] = reading.agreement(shown, chosen)
        rows.append({"captions": name, **{each: f"{share:.0%}" for each, share in found[name].items()}})
        sheet += [shown[:SHOWN], shown[SHOWN : 2 * SHOWN]]
    return Claim(
        "The base draws what a caption says, in words that it was trained on in other combinations too.",
        f"Pictures are right in every property for {found['trained on']['all']:.0%} of 40 captions that it was trained "
        f"on, and for {found['never seen']['all']:.0%} of 40 that it never saw.",
        found["never seen"]["all"] > 0.5,
        rows,
        sheet,
        ["captions it was trained on (two rows)", "captions it never saw (two rows)"],
    )


def concept(study: Study) -> Claim:
    lab = study.lab
    before = {name: weight.clone() for name, weight in lab.base.model.state_dict().items()}
    lora = study.zorp(rank=RANK)
    after = lab.base.model.state_dict()
    same = all(torch.equal(weight, after[name]) for name, weight in before.items())
    started = lab.learn(lab.shots(lab.learned[:2]), steps=1, foreseen=_finish(lab))
    first = lab.draw(lab.put(started), lab.zorps[:8])
    zero = all(map(torch.equal, first, lab.draw(lab.base, lab.zorps[:8])))
    marks, zorps, others = lab.judged(lab.put(lora))
    return Claim(
        "A LoRA of 20 pictures teaches the model a concept that it could not draw; W stays frozen (only A and B are "
        "trained), and because B begins as zero the adapter changes nothing before the first step.",
        f"Asked for zorps on grounds and at places that were not trained on, {study.base[0].zorps:.0%} of the pictures "
        f"show one before and {marks.zorps:.0%} after; other captions are drawn right in "
        f"{study.base[0].others:.0%} before and {marks.others:.0%} after. After training every weight of the base is "
        f"{'bit-identical' if same else 'NOT the same'}; with a LoRA of no steps the pictures are "
        f"{'bit-identical' if zero else 'NOT the same'}.",
        same and zero and marks.zorps > study.base[0].zorps + 0.5,
        [{"model": "base", **told(study.base[0])}, {"model": "with the LoRA", **told(marks)}],
        [_spoken(lab), study.base[1], zorps, study.base[2], others],
        [
            "training pictures",
            "asked for zorps: base",
            "asked for zorps: with the LoRA",
            "others: base",
            "others: LoRA",
        ],
    )


def rank(study: Study) -> Claim:
    rows, sheet = [], []
    found: dict[int, Marks] = {}
    for number in RANKS:
        lora, seconds = study.timed(rank=number)
        found[number], zorps, _ = study.lab.judged(study.lab.put(lora))
        pairs = changes(lora, study.lab.base).values()
        size = sum(sum(t.numel() for t in (one.up, one.down)) for one in lora.modules.values())
        whole = sum(weight.numel() for _, weight in pairs)
        share = relative(lora, study.lab.base)
        rows.append(
            {"rank": number, "trained": f"{size / whole:.1%}", **told(found[number]), "‖ΔW‖/‖W‖": f"{share:.3f}"}
        )
        rows[-1]["CPU s"] = f"{seconds:.0f}"
        sheet.append(zorps)
    best, least = found[max(RANKS)], found[min(RANKS)]
    return Claim(
        "A higher rank learns a concept more faithfully, and bleeds more into what it should leave alone.",
        f"Rank {min(RANKS)}: {least.zorps:.0%} zorps, {least.others:.0%} of other captions right; rank {max(RANKS)}: "
        f"{best.zorps:.0%} and {best.others:.0%}.",
        best.zorps >= least.zorps and best.others <= least.others,
        rows,
        sheet,
        [f"rank {number}" for number in RANKS],
    )


def alpha(study: Study) -> Claim:
    rows = []
    sizes: dict[str, list[float]] = {}
    for rule, of in (
        ("alpha = rank", lambda r: {}),
        ("alpha = 8", lambda r: {} if r == RANK else {"alpha": 8.0}),
        ("alpha = 8, rank-stabilised", lambda r: {"alpha": 8.0, "rank_stabilised": True}),
    ):
        for number in RANKS:
            lora = study.zorp(rank=number, **of(number))
            marks = study.lab.judged(study.lab.put(lora))[0]
            scale = next(iter(lora.modules.values())).scale
            share = relative(lora, study.lab.base)
            sizes.setdefault(rule, []).append(share)
            rows.append(
                {"rule": rule, "rank": number, "scale": f"{scale:.3g}", "‖ΔW‖/‖W‖": f"{share:.3f}", **told(marks)}
            )
    spread = {rule: max(each) / min(each) for rule, each in sizes.items()}
    return Claim(
        "ΔW is scaled by alpha/rank, rank-stabilised by alpha/√rank. With alpha/rank kept fixed a change of the rank "
        "leaves the strength about as it is; with a fixed alpha a higher rank is a weaker LoRA.",
        f"From rank {RANKS[0]} to {RANKS[-1]} the size of the update varies by a factor of "
        + ", ".join(f"{value:.2f} with {rule}" for rule, value in spread.items())
        + ".",
        spread["alpha = rank"] < spread["alpha = 8"],
        rows,
    )


def strength(study: Study) -> Claim:
    lab, lora = study.lab, study.zorp(rank=RANK)
    size = relative(lora, lab.base)
    rows, sheet, found = [], [], {}
    for value in STRENGTHS:
        found[value], zorps, others = lab.judged(lab.put(lora, value))
        rows.append({"strength": value, "‖ΔW‖/‖W‖": f"{size * value:.3f}", **told(found[value])})
        sheet.append([*zorps[: SHOWN // 2], *others[: SHOWN // 2]])
    strongest = found[STRENGTHS[-1]]
    return Claim(
        "A larger strength (or alpha, without training again) carries more of the concept, until pictures collapse.",
        f"Zorps appear at strength {_first(found, lambda m: m.zorps >= 0.5)}; other captions are right in "
        f"{found[0].others:.0%} at 0, {found[1].others:.0%} at 1, {strongest.others:.0%} at {STRENGTHS[-1]:g}, where "
        f"{strongest.zorps:.0%} of zorps are left.",
        found[0.0].zorps < found[1.0].zorps > strongest.zorps and strongest.grounds < found[1.0].grounds,
        rows,
        sheet,
        [f"strength {value:g}: zorps, others" for value in STRENGTHS],
    )


def truncation(study: Study) -> Claim:
    lab, whole = study.lab, study.zorp(rank=max(RANKS))
    rows, sheet, kept = [], [], {}
    spectra = {
        name: torch.linalg.svd(delta.double(), full_matrices=False)
        for name, (delta, _) in changes(whole, lab.base).items()
    }
    energy = sum(float(s.square().sum()) for _, s, _ in spectra.values())
    for number in CUTS:
        kept[number] = sum(float(s[:number].square().sum()) for _, s, _ in spectra.values()) / energy
        marks, zorps, _ = lab.judged(lab.put(_truncated(whole, spectra, number)))
        rows.append({"rank": number, "energy kept": f"{kept[number]:.1%}", **told(marks)})
        sheet.append(zorps)
    return Claim(
        "A low-rank update can't hold a change of a higher intrinsic rank: what a truncation loses is told by the "
        "energy that it keeps.",
        f"Of an update learned at rank {max(RANKS)}, the closest one of rank 1 keeps {kept[1]:.0%} of its energy, of "
        f"rank 4 {kept[4]:.0%}, of rank 16 {kept[16]:.0%}.",
        kept[1] < kept[4] < kept[16] <= 1,
        rows,
        sheet,
        [f"truncated to rank {number}" for number in CUTS],
    )


def targets(study: Study) -> Claim:
    rows, sheet, found = [], [], {}
    for name, patterns in TARGETS.items():
        lora = study.zorp(rank=RANK, **({} if patterns == ("*",) else {"patterns": patterns}))
        found[name], zorps, _ = study.lab.judged(study.lab.put(lora))
        rows.append({"targets": name, "modules": len(lora.modules), **told(found[name])})
        sheet.append(zorps)
    few, every = found["queries and keys"], found["all weights"]
    return Claim(
        "Which weights train decides what is learned: queries and keys alone steer where the model looks, and bring it "
        "nothing that it could not paint.",
        f"Queries and keys alone: {few.zorps:.0%} zorps, places {few.places:.0%}, grounds {few.grounds:.0%}, other "
        f"captions {few.others:.0%}; all weights: {every.zorps:.0%}, {every.places:.0%}, {every.grounds:.0%}, "
        f"{every.others:.0%}.",
        few.zorps < every.zorps and few.others >= every.others,
        rows,
        sheet,
        list(TARGETS),
    )


def identity(study: Study) -> Claim:
    """The trigger word for a figure that the base can paint, on grounds where it can be seen."""
    lab, rows, sheet, found = study.lab, [], [], {}
    asked, learned = ([scene for scene in each if scene.ground != KNOWN["colour"]] for each in (lab.zorps, lab.learned))
    meant = [scene._replace(**KNOWN) for scene in asked]
    shots = [Shot(scene.caption, pictures.draw(scene._replace(**KNOWN))) for scene in learned]
    for name, patterns in (("none", None), ("queries and keys", TARGETS["queries and keys"]), ("all weights", ("*",))):
        model = lab.put(lab.learn(shots, steps=study.steps, patterns=patterns)) if patterns else lab.base
        shown, others = (lab.draw(model, scenes) for scenes in (asked, lab.others))
        found[name] = {
            "red circles": reading.share(shown, meant, "colour", "shape"),
            "their place": reading.share(shown, meant, "place"),
            "their ground": reading.share(shown, meant, "texture", "ground"),
            "other captions": reading.agreement(others, lab.others)["all"],
        }
        rows.append({"targets": name, **{title: f"{share:.0%}" for title, share in found[name].items()}})
        sheet.append(shown)
    before, few, every = found.values()
    return Claim(
        "Queries and keys alone transfer an identity, while pose and composition stay with the base: so it is said of "
        "what a model can paint already, which a zorp is not. Here the word zorp comes to mean a red circle, on "
        "grounds of other colours.",
        f"With queries and keys alone {few['red circles']:.0%} of the pictures show a red circle (none trained: "
        f"{before['red circles']:.0%}, all weights: {every['red circles']:.0%}), {few['their place']:.0%} at the place "
        f"and {few['their ground']:.0%} on the ground that the caption says. Other captions are drawn right in "
        f"{few['other captions']:.0%} (all weights: {every['other captions']:.0%}).",
        few["red circles"] > before["red circles"] + 0.3 and min(few["their place"], few["their ground"]) > 0.6,
        rows,
        sheet,
        list(found),
    )


def preservation(study: Study) -> Claim:
    """As many looks at zorps each time. The class word is a figure that the base can paint, where it can be seen."""
    lab, rows, sheet, found, moved = study.lab, [], [], {}, {}
    word = f"{KNOWN['colour']} {KNOWN['shape']}"
    known = [scene._replace(**KNOWN) for scene in lab.zorps if scene.ground != KNOWN["colour"]]
    still = torch.stack(lab.draw(lab.base, known))
    shots = lab.shots(lab.learned)
    mixed = [*shots, *(shot._replace(regularisation=True) for shot in lab.shots(lab.prior))]
    once: dict[str, Any] = {"shots": shots, "steps": study.steps}
    twice: dict[str, Any] = {"shots": mixed, "steps": 2 * study.steps}
    pictured: dict[str, dict[str, Any]] = {
        "regularisation pictures": twice,
        "the base's answers to them": twice | {"preservation": ANSWERS},
    }
    worded = {
        **{f"class word, weight {each:g}": once | {"preservation": class_word(word, each)} for each in WEIGHTS},
        "class word, weight 1, twice the steps": twice | {"shots": shots, "preservation": class_word(word)},
    }
    ways = {"none": once, **pictured, **worded}
    for name, options in ways.items():
        model = lab.put(lab.learn(rank=RANK, **options))
        found[name], zorps, rest = lab.judged(model)
        shown = lab.draw(model, known)
        moved[name] = float((torch.stack(shown) - still).square().mean().sqrt())
        right = reading.agreement(shown, known)["all"]
        rows.append({"preservation": name, **told(found[name]), f"{word}s": f"{right:.0%}"})
        rows[-1]["moved by"] = f"{moved[name]:.3f}"
        sheet.append([*zorps[:4], *rest[:3], *shown[:3]])
        print(f"  {rows[-1]}", flush=True)
    others = {name: marks.others for name, marks in found.items()}
    return Claim(
        "Prior preservation keeps what a LoRA would otherwise carry away: by 20 pictures of other things beside the "
        "concept's, by what the base itself answers to their captions, or, without other pictures, by what it answers "
        f"to the concept's own captions with a class word: here *{word}* for *zorp*. The word keeps its class most "
        f"exactly, pictures of other things keep these better. *{word}s*: pictures that are right in every property, "
        f"of {len(known)} captions with the class word, on grounds and at places that were not trained on; *moved by*: "
        "how far they are from the base's (root mean square over pixels from 0 to 1).",
        f"Other captions are right in {others['none']:.0%} without it, in {_span(pictured, others, '.0%')} with other "
        f"pictures, in {_span(worded, others, '.0%')} with a class word. {word.capitalize()}s move by "
        f"{moved['none']:.3f}, {_span(pictured, moved, '.3f')} and {_span(worded, moved, '.3f')}. Zorps: "
        + ", ".join(f"{marks.zorps:.0%} ({name})" for name, marks in found.items())
        + ".",
        others["none"] < min(others[name] for name in worded)
        and max(others[name] for name in worded) < min(others[name] for name in pictured)
        and max(moved[name] for name in worded) < min(moved[name] for name in pictured) < moved["none"],
        rows,
        sheet,
        [f"{name}: zorps, others, {word}s" for name in ways],
    )


def masked(study: Study) -> Claim:
    lab = study.lab
    spoiled = [shot._replace(picture=framed(shot.picture)) for shot in lab.shots(lab.learned)]
    rows, sheet, frames = [], [[shot.picture for shot in spoiled]], {}
    for name, mask in (("none", None), ("all but the frame", 1 - frame())):
        lora = lab.learn([shot._replace(mask=mask) for shot in spoiled], steps=study.steps, rank=RANK)
        marks, zorps, _ = lab.judged(lab.put(lora))
        frames[name] = sum(map(has_frame, zorps)) / len(zorps)
        rows.append({"mask": name, "with a frame": f"{frames[name]:.0%}", "zorps": f"{marks.zorps:.0%}"})
        sheet.append(zorps)
    return Claim(
        "A masked loss learns a concept without what is beside it in every training picture: here a black frame that "
        "no caption names.",
        f"Without a mask {frames['none']:.0%} of the pictures have the frame, with one that leaves it out "
        f"{frames['all but the frame']:.0%}.",
        frames["none"] > 0.5 > 0.2 > frames["all but the frame"],
        rows,
        sheet,
        ["training pictures", "without a mask", "with a mask"],
    )


def files(study: Study) -> Claim:
    """Saved in every layout, read again by the pack and by the host's own loader."""
    import comfy.sd
    import comfy.utils

    lab, lora = study.lab, study.zorp(rank=RANK)
    scenes = [*lab.zorps[:4], *lab.others[:4]]
    drawn = torch.stack(lab.draw(lab.put(lora), scenes))
    layouts, families, loras = (lab.pack(f"lora_ops.{name}") for name in ("layouts", "families", "lora"))
    shapes = lab.pack("nodes.host.patching").shapes(lab.base, None)
    rows, most = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for layout in layouts.LAYOUTS:
            path = Path(folder) / (layout.name if layout.folder else f"{layout.name}.safetensors")
            layouts.write(path, lora, layout, families.recognise(shapes), shapes=shapes)
            again = {"our loader": lab.put(loras.read_lora(path))}
            if not layout.folder:
                held = comfy.utils.load_torch_file(str(path))
                again["the host's loader"] = comfy.sd.load_lora_for_models(lab.base, None, held, 1.0, 0)[0]
            for who, model in again.items():
                off = float((torch.stack(lab.draw(model, scenes)) - drawn).abs().max())
                most = max(most, off)
                size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
                rows.append(
                    {
                        "layout": layout.name,
                        "MB": f"{size / 1e6:.2f}",
                        "read by": who,
                        "largest difference": f"{off:.1e}",
                    }
                )
    return Claim(
        "A trained LoRA says the same in every layout, to our loader and to the host's.",
        f"The largest difference between pixels (0 to 1) of 8 pictures is {most:.1e}.",
        most < 0.02,
        rows,
    )


def in_the_graph(study: Study) -> Claim:
    """Everything by nodes, on a server: the data set's folders, training, saving, loading, sampling."""
    lab = study.lab
    asked = [*lab.zorps[:COUNT], *lab.others[:COUNT]]
    settings = GRAPH | {"steps": 2 * study.steps}
    report, drawn = graph.train(lab.comfy, lab.learned, lab.prior, asked, **settings)
    rows = [{"LoRA by": way, **_shares(shown, asked)} for way, shown in drawn.items()]
    first, *others = drawn.values()
    apart = max(float((a - b).abs().max()) for each in others for a, b in zip(first, each, strict=True))
    return Claim(
        "A folder of pictures becomes a LoRA in the graph, which does the same wherever it is loaded.",
        f"By nodes on a ComfyUI server, from 20 pictures and 20 of other things as regularisation, in "
        f"{report['seconds']:.0f} s: {rows[0]['zorps']} zorps, {rows[0]['other captions']} of other captions right. "
        f"Pictures by the trained MODEL, by our loader and by the host's differ by {apart * 255:.0f} of 255 at most.",
        sum(map(_is_zorp, first[:COUNT])) > COUNT / 2 and apart <= 1 / 255,
        rows,
        [[*first[: SHOWN // 2], *first[COUNT : COUNT + SHOWN // 2]]],
        ["zorps, others"],
    )


def text_encoder(study: Study) -> Claim:
    """The same, half as long and without regularisation, with the text encoder learning along and without."""
    lab, rows, sheet = study.lab, [], []
    asked = [*lab.zorps[:COUNT], *lab.others[:COUNT]]
    for name, choice in (("off", {}), ("on", {"text_encoder.learning_rate": 3e-5})):
        settings = GRAPH | {"steps": study.steps // 2, "text_encoder": name, **choice}
        report, drawn = graph.train(lab.comfy, lab.learned, (), asked, **settings)
        ours, hosts = drawn["our loader"], drawn["the host's loader"]
        same = all(map(torch.equal, ours, hosts))
        row = {"text encoder": name, **_shares(ours, asked), "loss at the end": f"{report['smoothed']:.4f}"}
        rows.append(row | {"the host's loader draws": "the same" if same else "OTHER pictures"})
        sheet.append([*ours[: SHOWN // 2], *ours[COUNT : COUNT + SHOWN // 2]])
    return Claim(
        "A text encoder may learn along, at a rate of its own, and is in the file for every loader.",
        f"After {study.steps // 2} steps: {rows[0]['zorps']} zorps without it and {rows[1]['zorps']} with it; other "
        f"captions {rows[0]['other captions']} and {rows[1]['other captions']}. Here a random encoder tells captions "
        "apart well enough; what it adds is for words that it does not.",
        all(row["the host's loader draws"] == "the same" for row in rows) and not all(map(torch.equal, *sheet)),
        rows,
        sheet,
        ["off: zorps, others", "on: zorps, others"],
    )


def _shares(shown: Sequence[Tensor], asked: Sequence[Scene]) -> dict[str, str]:
    kept = reading.agreement(shown[COUNT:], asked[COUNT:])["all"]
    return {"zorps": f"{sum(map(_is_zorp, shown[:COUNT])) / COUNT:.0%}", "other captions": f"{kept:.0%}"}


def _is_zorp(picture: Tensor) -> bool:
    found = reading.read(picture)
    return (found.shape, found.colour) == pictures.ZORP


CLAIMS: Mapping[str, Callable[[Study], Claim]] = {
    "base": base,
    "concept": concept,
    "preservation": preservation,
    "strength": strength,
    "rank": rank,
    "truncation": truncation,
    "targets": targets,
    "identity": identity,
    "masked": masked,
    "alpha": alpha,
    "files": files,
    "graph": in_the_graph,
    "text-encoder": text_encoder,
}


def measure(comfy: Path, names: Sequence[str], steps: int, out: Path) -> None:
    """Measure these claims and write them beside those that are in out already."""
    study = Study(comfy, steps)
    out.mkdir(parents=True, exist_ok=True)
    store = out / "claims.json"
    about = {**machine(comfy), "steps": steps}
    found = json.loads(store.read_text("utf-8")) if store.exists() else {"about": about, "claims": {}}
    if set(names) == set(CLAIMS):
        found["about"] = about
    for name in names:
        print(name, flush=True)
        claim = CLAIMS[name](study)
        found["claims"][name] = {
            "says": claim.says,
            "found": claim.found,
            "holds": claim.holds,
            "rows": list(claim.rows),
            "sheet": list(claim.about),
            **({} if about == found["about"] else {"about": about}),
        }
        if claim.sheet:
            pictures.save(_sheet(claim.sheet), out / f"{name}.png")
        store.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (out / "README.md").write_text(page(found), encoding="utf-8")
        print(f"  {claim.found}\n  {'holds' if claim.holds else 'DOES NOT HOLD'}", flush=True)


def _finish(lab: Lab) -> Callable[[Any, int], None]:
    def stop(*_: Any) -> None:
        raise lab.pack("nodes.host.training").Finish

    return stop


def _span(names: Iterable[str], of: Mapping[str, float], form: str) -> str:
    """From the least to the most of these."""
    least, *_, most = sorted(of[name] for name in names)
    return f"{least:{form}} to {most:{form}}" if least < most else f"{most:{form}}"


def _spoken(lab: Lab) -> list[Tensor]:
    return [shot.picture for shot in lab.shots(lab.learned[:SHOWN])]


def _truncated(lora: Any, spectra: Mapping[str, Any], rank: int) -> Any:
    modules = {}
    for name, (u, s, vh) in spectra.items():
        up, down = u[:, :rank] * s[:rank], vh[:rank]
        modules[name] = replace(lora.modules[name], up=up.float(), down=down.float(), alpha=None)
    return replace(lora, modules=modules)


def _first(found: Mapping[float, Marks], there: Callable[[Marks], bool]) -> str:
    return next((f"{value:g}" for value, marks in found.items() if there(marks)), "none")


def _sheet(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Half as large as they are drawn."""
    shown = [picture for row in rows for picture in row[:SHOWN]]
    small = pictures.enlarged(avg_pool2d(torch.stack(shown), pictures.CELL), pictures.CELL // 2)
    return pictures.sheet(small, SHOWN)


def page(found: Mapping[str, Any]) -> str:
    text = [INTRODUCTION, _measured(found)]
    for name in (name for name in CLAIMS if name in found["claims"]):
        claim = found["claims"][name]
        columns = list(claim["rows"][0])
        text += [f"## {name.capitalize()}\n\n{claim['says']}\n"]
        text += [f"**{'Holds' if claim['holds'] else 'Does not hold here'}.** {claim['found']}\n"]
        text += [_measured(claim)] if "about" in claim else []
        text += [f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"]
        text += [f"| {' | '.join(str(row[column]) for column in columns)} |" for row in claim["rows"]]
        if claim["sheet"]:
            text += [f"\n![{name}]({name}.png)\n\nFrom above: {'; '.join(claim['sheet'])}."]
        text += [""]
    return "\n".join(text)


def _measured(told: Mapping[str, Any]) -> str:
    return f"Measured with {', '.join(f'{key} {value}' for key, value in told['about'].items())}.\n"


INTRODUCTION = """# LoRA claims, measured on the small world

The small world is a FLUX of two million parameters that draws one figure on a ground as a caption says it ("a red
circle at the left on striped blue"). It was trained from scratch on a CPU (`python -m harness.world train`); a program
without any network reads from a picture what it shows, so each figure below is a share of pictures. What the model
never saw is a *zorp*: an hourglass, black above orange.

Every LoRA here was learned by the pack's own trainer on 20 pictures of zorps, put on by its own patching and drawn by
ComfyUI's own sampler. `python -m harness.world claims` measures all of it anew and writes this page.

- *zorps*: pictures that show a zorp, of 16 captions that ask for one and were not trained on
- *their place*, *their ground*: of these pictures, those with the figure where, and the ground that, the caption says
- *other captions*: pictures that are right in colour, shape, place, texture and ground, of 16 captions without a zorp
  that the base was trained on
"""
