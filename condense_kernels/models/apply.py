"""apply_condense: a stock transformers model on K visual tokens an image.

Images are encoded by the model's own get_image_features, while one attention module of the encoder is listened to; the
placeholders of dropped tokens leave the prompt; the model's own forward or generate gets the rest, and the condensed
features by its own argument mm_encoder_outputs. No forward is copied, no class is changed.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from .._dispatch.checks import check_flag
from ..budget import DEFAULT_BACKGROUND_RATIO, as_number
from .carried import CARRIED, Carried, carrying, laid_out
from .checks import check_call, check_continued, check_features, check_model, check_options, resolve_family
from .families import Family, Inputs, layer_of
from .generation import check_repeated, mask_of, seen_whole, with_lengths, with_prompt
from .images import Images, joined_by_row
from .instance import Replaced, Turns
from .methods import Condenser, Method
from .positions import check_positions, given_positions, has_places, set_places
from .prompt import kept_columns, pad_token_of, shortened
from .proportional import Weighed, attentions_of
from .report import Report
from .scoring import Recorder, attention_of, has_class_token, is_recomputed, recording
from .timing import Stopwatch

MARK = "condense_handle"  # the attribute of a model that a handle is applied to
VIDEO = "pixel_values_videos"


class CondenseHandle:
    """What apply_condense returns: ``remove()`` gives the model back as it was; ``report()`` says what was done."""

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        keep: int | float,
        condenser: Condenser,
        positions: str,
        proportional: bool,
    ) -> None:
        self.model, self.family, self.keep, self.condenser = model, family, keep, condenser
        self.positions = positions
        self.base = model.base_model
        self.tower = self.base.get_encoder(modality="image")
        self.class_token = has_class_token(self.tower)
        self.encoder_arguments = tuple(inspect.signature(self.base.get_image_features).parameters)
        self.layer: int | None = None  # these three of the last call with images
        self.counts: list[tuple[int, int]] = []  # N, K of each image, or of each of its crops
        self.watch: Stopwatch | None = None
        self.turns = Turns()
        attention_of(self.tower, layer_of(model.config, {}))  # without any it is refused now, not in its first call
        self.weighed = Weighed(attentions_of(model)) if proportional else None
        setattr(model, MARK, self)
        names = ("forward", "generate") if model.can_generate() else ("forward",)
        self.replaced = [Replaced(self, name) for name in names]

    @property
    def applied(self) -> bool:
        return self.model.__dict__.get(MARK) is self

    def remove(self) -> None:
        """Give the model back as it was. A second call does nothing."""
        if self.applied:
            for method in self.replaced:
                method.remove()
            if self.weighed is not None:
                self.weighed.remove()
            delattr(self.model, MARK)

    def __enter__(self) -> "CondenseHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def report(self) -> Report:
        """What is listened to; of the last call that had images, N -> K of each and the times. Waits for the device."""
        layer = layer_of(self.model.config, {}) if self.layer is None else self.layer
        path, attention = attention_of(self.tower, layer)
        rows = "[CLS] row" if self.class_token else "mean over all rows"
        how = "from its input and weights" if is_recomputed(attention) else "from its queries and keys as it runs"
        method, projector = self.condenser.method, self.family.projector
        names = ("encoder", "scores", "operator")
        return Report(
            model=type(self.model).__name__,
            method=method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__),
            scores=f"{rows} of {type(self.tower).__name__}.{path}, {how}",
            features="after the projector" if projector is None else f"before {projector}",
            images=tuple(self.counts),
            **{} if self.watch is None else {f"{name}_ms": self.watch.milliseconds(name) for name in names},
        )

    # What follows is the way of one call.

    def forward(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, on condensed images."""
        if not args and kwargs.get("pixel_values") is None:  # each step of decoding
            return carrying(stock, kwargs)
        inputs = self.by_name("forward", args, kwargs)
        if inputs.get("pixel_values") is not None:
            check_call(inputs, self.family)
            inputs = self.rewritten(inputs, self.handed_on(inputs))
        return carrying(stock, inputs)

    @torch.no_grad()  # as the model's own, which begins too late for the encoder
    def generate(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate, on condensed images. What it returns begins with the prompt as it was given."""
        given = self.by_name("generate", args, kwargs)
        ids = given.pop("inputs", None)
        if ids is not None:
            given["input_ids"] = ids
        if given.get("pixel_values") is None:
            check_continued(given, self.model.config.image_token_id)
            return stock(*args, **kwargs)
        check_call(given, self.family)
        if given.get("attention_mask") is None:
            given["attention_mask"] = mask_of(self.model, given)
        rewritten = self.rewritten(given, {}, in_generate=True)
        check_repeated(self.model, given, rewritten)
        long, short = given["input_ids"], rewritten["input_ids"]
        removed = long.shape[1] - short.shape[1]
        result = stock(**seen_whole(with_lengths(self.model, rewritten, removed), long, short.shape[1]))
        return with_prompt(result, long, short.shape[1])

    def by_name(self, method: str, args: tuple, kwargs: Inputs) -> Inputs:
        """The arguments of a call. The class knows their names; what was put around its method since may not."""
        signature = inspect.signature(getattr(type(self.model), method))
        bound = signature.bind_partial(self.model, *args, **kwargs).arguments
        named = {name: value for name, value in bound.items() if name != "self"}
        return {**named.pop("kwargs", {}), **named}

    def handed_on(self, inputs: Inputs) -> Inputs:
        """What forward does not name, some families hand on to get_image_features: output_hidden_states, for one."""
        if not self.family.hands_on:
            return {}
        named = {name for part in (self.model, self.base) for name in inspect.signature(type(part).forward).parameters}
        return {name: value for name, value in inputs.items() if name not in named and name != "return_dict"}

    def rewritten(self, inputs: Inputs, handed_on: Inputs, in_generate: bool = False) -> Inputs:
        """The arguments of forward or generate, with condensed features in place of pixels."""
        positions = given_positions(self.base, self.positions, inputs)
        images, output = self.encode(inputs, handed_on)
        outputs = {"image": output}
        if inputs.get(VIDEO) is not None:
            outputs["video"] = self.encode_video(inputs)
        spent = {*self.encoder_arguments, VIDEO, "video_grid_thw"}
        rest = {name: value for name, value in inputs.items() if name not in spent}
        ids, image_token_id = inputs["input_ids"], self.model.config.image_token_id
        stays = kept_columns(ids, image_token_id, images.tokens, images.kept)
        of_rows = (stays & (ids == image_token_id)).sum(dim=1).tolist()
        for name in ("pooler_output", *self.family.planes):
            setattr(output, name, joined_by_row(getattr(output, name), of_rows))
        places = has_places(self.base)
        if positions is not None and (places or not bool(stays.all())):  # of all tokens the model counts as it does
            rest["position_ids"] = positions
        rest = shortened(rest, stays, pad_token_of(self.model.config))
        if positions is not None and places:
            set_places(self.base, rest, text_row=in_generate)
        own = None if places or positions is None else rest.get("position_ids")
        log_sizes = None if self.weighed is None else images.log_sizes()
        if own is not None or log_sizes is not None:
            visual = rest["input_ids"] == image_token_id
            setattr(output, CARRIED, Carried(own, None if log_sizes is None else laid_out(log_sizes, visual)))
        return {**rest, "mm_encoder_outputs": outputs}

    def encode_video(self, inputs: Inputs) -> Any:
        accepted = inspect.signature(self.base.get_video_features).parameters
        given = {name: inputs[name] for name in accepted if inputs.get(name) is not None}
        return self.base.get_video_features(**given, return_dict=True)

    def encode(self, inputs: Inputs, handed_on: Inputs) -> tuple[Images, Any]:
        config, watch = self.model.config, Stopwatch(self.model.device)
        if self.class_token and self.family.projector is not None:
            check_features(config, inputs)
        layer = layer_of(config, inputs)
        _, attention = attention_of(self.tower, layer)
        grids = None if self.family.segments is None else self.family.segments(config, inputs)
        recorder = Recorder(self.class_token, None if grids is None else [h * w for h, w in grids], watch)
        images = Images(self.base, self.family, self.keep, self.condenser, inputs, recorder, watch)
        given = {name: inputs[name] for name in self.encoder_arguments if inputs.get(name) is not None}
        with self.turns, recording(attention, recorder), images.before_projector(), watch.span("encoder"):
            output = self.base.get_image_features(**given, **handed_on, return_dict=True)
        images.after_projector(output)
        self.layer, self.counts, self.watch = layer, images.counts, watch
        return images, output


def apply_condense(
    model: PreTrainedModel,
    num_tokens: int | float = 64,
    *,
    method: str | Method = "condensevlm",
    background_ratio: float = DEFAULT_BACKGROUND_RATIO,
    suppression: float = 1.0,
    spatial_weight: float = 1.0,
    background_suppression: float | None = None,
    scale_prior: bool = True,
    positions: str = "compact",
    proportional: bool = False,
    family: str | None = None,
    backend: str = "auto",
) -> CondenseHandle:
    """Make a stock multimodal model run on ``num_tokens`` visual tokens an image; ``handle.remove()`` takes it back.

    ``model.generate(**inputs)`` and ``model(**inputs, labels=labels)`` go on as before, on what the processor returned:
    the images are encoded, condensed by :func:`condense_kernels.condense` (Eq. 2 to 8 of CondenseVLM), and the prompt
    loses the placeholders of the rest. Scores (Eq. 1) are the attention of [CLS] to each patch in one layer of the
    vision encoder, the mean over all patches' attention where it has no [CLS]. generate returns the prompt as it was
    given, followed by the new tokens; max_length counts the prompt as it was given, too. Videos go through untouched.

    Args:
        model: a transformers model with images, by its checkpoint, on one device and not quantised.
        num_tokens: a count (int) or a ratio in (0, 1] (float) of each image's tokens, rounded as
            :func:`split_budget` says; of each crop, where an image is several (LLaVA-NeXT, LLaVA-OneVision).
        method: "condensevlm"; a baseline: "topk" (the highest scores, nothing merged), "topk_merge", "maxmin" (always
            the token farthest from those kept), "random" (by torch's generator), "random_merge", "uniform" (a coarser
            grid), "pooling"; another of condense_kernels.methods that reads [CLS] attention or no scores and needs at
            most a grid; or a callable (features [B, N, D], scores [B, N], keep, grid) -> Condensed, for B images of
            one size.
        background_ratio, suppression, spatial_weight, background_suppression, scale_prior: as in
            :func:`condense_kernels.condense`, of "condensevlm".
        positions: of the tokens that are left, in a language model with positions along one axis: "compact" counts
            them 0, 1, 2, as the papers' code does; "original" leaves each token where it was in the prompt as it was
            given, new ones after the last. With M-RoPE tokens keep their places in the picture in either case, and
            position_ids of the caller stay what they are.
        proportional: whether a visual token counts as often in the language model's attention as there are tokens in
            it: log(size) is added to the logits of its key, in each layer, as in ToMe. Where nothing is merged it
            changes nothing.
        family: None: by model.config.model_type. A name of condense_kernels.models.FAMILIES for a model that is built
            like one of it; "generic" for one that has no row: a warning says what is then assumed.
        backend: "auto" (by device), "cpp", "triton" or "reference".

    Returns:
        The handle: ``remove()``, ``report()``; as a context manager it removes itself. copy.deepcopy(model) copies it.

    Raises:
        TypeError, ValueError: from here, a model without images, quantised, on several devices, of an unknown family,
            or condensed already; a wrong option. From calls, more tokens kept than there are, placeholders that do not
            match the images, a filled cache together with images. The model is left as it was found.
    """
    check_model(model, MARK)
    weights = suppression, spatial_weight, background_suppression
    condenser = Condenser(method, background_ratio, *weights, scale_prior, backend)
    num_tokens = as_number("num_tokens", num_tokens)
    check_options(num_tokens, condenser)
    found = resolve_family(model, family)
    check_positions(model, found, positions)
    check_flag("proportional", proportional)
    return CondenseHandle(model, found, num_tokens, condenser, positions, proportional)
