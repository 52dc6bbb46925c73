"""LightCompress (llmc), beside llmc/compression/token_reduction/divprune.py: a class for TOKEN_REDUCTION_REGISTRY."""

import functools
from types import MethodType
from typing import Any

from ..methods.registry import Method
from .keep_list import keep_list

IMAGE = -200  # IMAGE_TOKEN_INDEX of llava.constants


def token_reduction(base: type[Any], method: Method, *, image_token: int = IMAGE, **options: Any) -> type[Any]:
    """A method as a class for ``@TOKEN_REDUCTION_REGISTRY.register(name)``, for the host's model class Llava.

    It wraps ``model.vlm_model.prepare_inputs_labels_for_multimodal``, as the host's divprune.py does, and keeps
    ``special: {keep: K}`` of the configuration of the ``image_token_length`` visual tokens, as :func:`keep_list`.
    The host's ``rate`` is the share that stays in its divprune.py, and that leaves in its fastervlm.py: here it is a
    count. No attention is at hand there: for methods that read none (scores=None). What differs else: labels are
    indexed as well, a prompt without an attention mask does not raise, and one without an image passes.

    Args:
        base: the host's TokenReductionModule, of token_reduction_module.py.
        method: of condense_kernels.methods; ``options`` go to it.
        image_token: the placeholder of an image in input_ids.

    Raises (the class): KeyError of no ``keep``. (Its wrapper) ValueError: more than one prompt, or more than one image.
    """

    class Reduction(base):  # type: ignore[misc]
        def __init__(self, config: Any, model: Any, blocks: Any) -> None:
            super().__init__(config, model, blocks)
            self.keep = int(self.special_config["keep"])
            self.register_reduction_modules()

        def register_reduction_modules(self) -> None:
            length, vlm = self.model.pruning_config["image_token_length"], self.model.vlm_model
            prepare = vlm.prepare_inputs_labels_for_multimodal

            @functools.wraps(prepare)
            def reduced(vlm: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
                outputs = prepare(input_ids, *args, **kwargs)
                places = (input_ids == image_token).nonzero()
                if input_ids.shape[1] == 1 or len(places) == 0:  # a step of decoding, or text alone
                    return outputs
                if len(input_ids) != 1 or len(places) != 1:
                    raise ValueError(
                        f"input_ids: expected one prompt with one image, got {len(places)} images in {len(input_ids)}."
                    )
                mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
                start = int(places[0, 1])
                if mask is not None:  # padding is gone from the prompt
                    start = int(mask[0, :start].sum())
                _, positions, mask, past, embeds, labels = outputs
                kept = keep_list(
                    method, embeds, start, length, self.keep, position_ids=positions, attention_mask=mask, **options
                )
                labels = labels if labels is None else labels.take_along_dim(kept.indices, 1)
                return outputs[0], kept.position_ids, kept.attention_mask, past, kept.inputs_embeds, labels

            vlm.prepare_inputs_labels_for_multimodal = MethodType(reduced, vlm)

    return Reduction
