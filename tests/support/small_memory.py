"""A GPU's memory that is too small, played on a CPU."""


def small_memory(trainer, rows, from_step, training=True):
    """Let a forward pass of more rows than this find the memory full, from a step on; in training, or else in measuring."""
    import torch

    def forward(module, args, kwargs):
        if module.training == training and len(kwargs["input_ids"]) > rows and trainer.state.global_step >= from_step:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return trainer.model.register_forward_pre_hook(forward, with_kwargs=True)
