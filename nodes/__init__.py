"""The nodes: thin, one file a subject. To add one: write its class, name it in `NODES`.

A node's id and the order of its inputs are frozen once released: workflows store values by position. New inputs are
appended; a changed meaning is a new node.
"""

from .dataset import LoraOpsDataset
from .host.api import ComfyExtension
from .inspecting import LoraOpsPatches, LoraOpsUnload
from .loading import LoraOpsLoad, LoraOpsTriggerWords
from .merging import LoraOpsMerge
from .patching import LoraOpsApply
from .saving import LoraOpsMergeFiles, LoraOpsSaveCheckpoint, LoraOpsSaveLora
from .scaling import LoraOpsScale
from .stacking import LoraOpsStack
from .training import LoraOpsLossPlot, LoraOpsTrain

NODES = (
    LoraOpsLoad,
    LoraOpsApply,
    LoraOpsStack,
    LoraOpsTriggerWords,
    LoraOpsScale,
    LoraOpsPatches,
    LoraOpsUnload,
    LoraOpsMerge,
    LoraOpsSaveCheckpoint,
    LoraOpsSaveLora,
    LoraOpsMergeFiles,
    LoraOpsDataset,
    LoraOpsTrain,
    LoraOpsLossPlot,
)


def extension() -> ComfyExtension:
    class LoraOps(ComfyExtension):
        async def on_load(self):
            from .host import routes  # imports the host's server, which only a running host has

            routes.register()

        async def get_node_list(self):
            return list(NODES)

    return LoraOps()
