"""A model made to leave its tensors alone does, and hooks within it write as they are written."""

from __future__ import annotations

import torch

from lora_ops.inplace import AsWritten, OutOfPlace


def test_augmented_assignments_make_new_tensors_and_hooks_write_into_theirs():
    x = torch.ones(2)
    with OutOfPlace():
        y = x
        y += 1
        with AsWritten(), AsWritten():
            pass
        z = x
        z *= 3
        assert y.tolist() == [2, 2] and z.tolist() == [3, 3] and x.tolist() == [1, 1]
        with AsWritten():
            x[:1].add_(5)
    assert x.tolist() == [6, 1]


def test_a_hook_that_fails_leaves_the_model_as_it_ran():
    x = torch.ones(1)
    with OutOfPlace():
        try:
            with AsWritten():
                raise ValueError
        except ValueError:
            pass
        x.add_(1)
    assert x.tolist() == [1]
