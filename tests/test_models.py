"""apply_condense on a tiny model of each family: what it computes, against the oracles. test_models_generate.py has
generation, test_models_handle.py what is done to the model."""

import copy

import oracles
import pytest
import torch
import zoo
from oracles import language_model_positions, pick, row_lengths
from zoo import IMAGE, MIXED

import condense_kernels
from condense_kernels.models import apply_condense

KEEP = 5
MROPE = [family.name for family in zoo.FAMILIES if family.mrope]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def one_thread():
    """Several may cut a product by its number of rows, which changes its bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def condensed_rows(case, rows, side, keep, **options) -> list[torch.Tensor]:
    """Logits of each row without its padding."""
    batch = case.inputs(rows, side)
    with apply_condense(case.model, keep, **options):
        logits = case.model(**batch).logits
    lengths = row_lengths(case, rows, keep)
    assert logits.shape[1] == max(lengths)  # of padding no more than the longest row needs
    return oracles.of_rows(logits, lengths, side)


def test_the_zoo_has_a_model_of_each_row_of_the_table():
    """And one of LLaVA's type on Pixtral's encoder."""
    from condense_kernels.models import FAMILIES

    assert {*FAMILIES, "pixtral"} == set(zoo.NAMES)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_all_tokens_are_the_stock_model_bit_for_bit(name, side, one_thread):
    case = zoo.case(name)
    batch = case.inputs(MIXED, side)
    expected = case.model(**batch).logits
    for method in (pick, "topk", "random"):
        with apply_condense(case.model, 1.0, method=method):
            assert torch.equal(case.model(**batch).logits, expected)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_scores_and_grids_are_those_of_the_attention_maps(name):
    case = zoo.case(name)
    batch, seen = case.inputs(MIXED), []

    def listen(features, scores, keep, grid):
        seen.extend((image, score, grid) for image, score in zip(features, scores, strict=True))
        return pick(features, scores, keep, grid)

    with apply_condense(case.model, KEEP, method=listen):
        case.model(**batch)
    features = oracles.encode(case, MIXED, batch).features
    expected = zip(features, oracles.scores(case, MIXED, batch), oracles.grids(case, MIXED), strict=True)
    for (image, score, grid), (its_features, its_score, its_grid) in zip(seen, expected, strict=True):
        torch.testing.assert_close(score, its_score, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(image, its_features, rtol=1e-4, atol=1e-5)
        assert tuple(grid) == its_grid


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [family.name for family in zoo.FAMILIES if not family.recurrent])
def test_selected_tokens_see_what_they_saw_among_all(name, side):
    """The others are there and hidden; test_oracles.py holds this oracle to the next one."""
    case = zoo.case(name)
    selection = oracles.best(oracles.scores(case, MIXED, case.inputs(MIXED)), KEEP)
    hidden = oracles.masked(case, MIXED, side, selection)
    expected = case.model(**hidden).logits
    found = condensed_rows(case, MIXED, side, KEEP, method=pick)
    for row, of_all, mask in zip(found, expected, hidden["attention_mask"], strict=True):
        torch.testing.assert_close(row, of_all[mask == 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_merged_tokens_are_those_of_condense(name, side):
    """By the paper's method, in a prompt that never had the other placeholders, row by row."""
    case = zoo.case(name)
    batch = case.inputs(MIXED)
    encoded = oracles.encode(case, MIXED, batch)
    options = dict(background_ratio=0.4, suppression=0.5, spatial_weight=0.7, background_suppression=2.0)
    results = [
        condense_kernels.condense(features[None], scores[None], KEEP, **options, grid=grid)
        for features, scores, grid in zip(
            encoded.features, oracles.scores(case, MIXED, batch), oracles.grids(case, MIXED), strict=True
        )
    ]
    scores = oracles.scores(case, MIXED, batch)
    planes = [
        [weighted(*of_image) for of_image in zip(plane, scores, results, strict=True)] for plane in encoded.planes
    ]
    for features, score, result in zip(encoded.features, scores, results, strict=True):
        torch.testing.assert_close(weighted(features, score, result), result.merged[0], rtol=1e-4, atol=1e-5)
    selection, merged = [result.indices[0] for result in results], [result.merged[0] for result in results]
    found = condensed_rows(case, MIXED, side, KEEP, **options)
    for row, alone in zip(found, oracles.removed(case, MIXED, selection, merged, planes), strict=True):
        torch.testing.assert_close(row, case.model(**alone).logits[0], rtol=1e-4, atol=2e-4)


def weighted(features, scores, condensed) -> torch.Tensor:
    """Eq. 8 of one image: the mean of each row's tokens, weighted by their scores."""
    rows = (condensed.assignment[0] == torch.arange(KEEP)[:, None]).float() * scores
    return rows / rows.sum(1, keepdim=True) @ features


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_ratio_is_of_each_image(name, side):
    case = zoo.case(name)
    lengths = [len(scores) for scores in oracles.scores(case, MIXED, case.inputs(MIXED))]
    with apply_condense(case.model, 0.5, method=pick) as handle:
        batch = case.inputs(MIXED, side)
        logits = case.model(**batch).logits
        assert handle.report().images == tuple((n, (n + 1) // 2) for n in lengths)  # halves up
    text = [len(prompt) - prompt.count(IMAGE) for prompt in map(case.prompt, MIXED)]
    halves = iter((n + 1) // 2 for n in lengths)
    assert logits.shape[1] == max(
        length + sum(next(halves) for _ in range(sum(case.crops(row)))) for length, row in zip(text, MIXED, strict=True)
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_labels_lose_what_the_prompt_loses(name, side):
    """The loss is that of the text that is left, each token by the one before it."""
    case = zoo.case(name)
    with apply_condense(case.model, KEEP, method=pick):
        result = case.model(**case.inputs(MIXED, side, labels=True))
    rows = oracles.of_rows(result.logits, row_lengths(case, MIXED, KEEP), side)
    batch = case.inputs(MIXED, side, labels=True, unpacked=True)
    scores = oracles.scores(case, MIXED, case.inputs(MIXED))
    stays = oracles.staying(batch, oracles.best(scores, KEEP), list(map(len, scores)))
    labels = [row[kept] for row, kept in zip(batch["labels"], stays & (batch["attention_mask"] == 1), strict=True)]
    logits = torch.cat([row[:-1] for row in rows])
    expected = torch.nn.functional.cross_entropy(logits, torch.cat([row[1:] for row in labels]))
    torch.testing.assert_close(result.loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MROPE)
@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_keep_their_places_in_the_picture(name, side):
    """M-RoPE: what the language model gets are columns of the positions of all tokens."""
    case = zoo.case(name)
    with apply_condense(case.model, KEEP, method=pick), language_model_positions(case) as seen:
        case.model(**case.inputs(MIXED, side))
    batch = case.inputs(MIXED, side)
    scores = oracles.scores(case, MIXED, batch)
    stays = oracles.staying(batch, oracles.best(scores, KEEP), list(map(len, scores)))
    real = stays & (batch["attention_mask"] == 1)
    expected = oracles.mrope(case, batch)
    for row, length in enumerate(row_lengths(case, MIXED, KEEP)):
        found = seen[0][-3:, row]
        found = found[:, -length:] if side == "left" else found[:, :length]
        assert torch.equal(found, expected[:, row, real[row]])


@pytest.mark.parametrize("name", zoo.NAMES)
def test_text_alone_passes_untouched(name, one_thread):
    case = zoo.case(name)
    batch = case.inputs(((), ()))
    expected = case.model(**batch).logits
    with apply_condense(case.model, KEEP):
        assert torch.equal(case.model(**batch).logits, expected)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_batch_is_its_rows(name):
    """With features that several images merge into: of what surrounds an image nothing comes in."""
    case = zoo.case(name)
    together = condensed_rows(case, MIXED, "right", KEEP)
    for row, logits in zip(MIXED, together, strict=True):
        torch.testing.assert_close(condensed_rows(case, [row], "left", KEEP)[0], logits, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_video_goes_through_as_it_is(name, side):
    """In the batch of an image that is condensed: all of its tokens are there, at their places."""
    case = zoo.case(name)
    batch = second_as_a_video(case.inputs(((0,), (3,)), side))
    scores = oracles.scores(case, ((0,),), batch)
    mask = batch["attention_mask"] * oracles.staying(batch, oracles.best(scores, KEEP), [len(scores[0])])
    places = oracles.mrope(case, batch)
    hidden = {**batch, "attention_mask": mask, "position_ids": torch.cat([oracles.compact(mask)[None], places])}
    with apply_condense(case.model, KEEP, method=pick):
        found = oracles.of_rows(case.model(**batch).logits, mask.sum(1).tolist(), side)
    for row, of_all, real in zip(found, case.model(**hidden).logits, mask, strict=True):
        torch.testing.assert_close(row, of_all[real == 1], rtol=1e-4, atol=1e-4)


def second_as_a_video(batch: dict) -> dict:
    """Of one frame: placeholders, types and pixels of the second image under their other names."""
    batch["input_ids"][1][batch["input_ids"][1] == IMAGE] = zoo.VIDEO
    batch["mm_token_type_ids"][1] *= 2
    grids = batch["image_grid_thw"].split(1)
    pixels = batch["pixel_values"].split([int(grid.prod()) for grid in grids])
    batch |= dict(zip(("image_grid_thw", "video_grid_thw"), grids, strict=True))
    return batch | dict(zip(("pixel_values", "pixel_values_videos"), pixels, strict=True))


@pytest.mark.parametrize("name", ["llava", "llava_next", "mistral3"])
def test_a_layer_by_argument_is_as_one_by_config(name):
    """The features', and with it that of the scores."""
    case = zoo.case(name)
    batch, model = case.inputs(MIXED), copy.deepcopy(case.model)
    model.config.vision_feature_layer = -3
    with apply_condense(model, KEEP), apply_condense(case.model, KEEP):
        expected = model(**batch).logits
        assert torch.equal(case.model(**batch, vision_feature_layer=-3).logits, expected)
        assert not torch.equal(case.model(**batch).logits, expected)


@pytest.mark.parametrize("positive", [1, 2, 3])
def test_a_layer_counted_from_the_front_is_that_counted_from_the_back(positive):
    """vision_feature_layer counts the embeddings as 0: of three layers, 2 is -2."""
    case = zoo.case("llava")
    found = []
    for layer in (positive, positive - 4):
        with apply_condense(case.model, KEEP) as handle:
            logits = case.model(**case.inputs(((0,),)), vision_feature_layer=layer).logits
            found.append((handle.report().scores, logits))
    assert found[0][0] == found[1][0] and f"layers.{positive - 1}." in found[0][0]
    assert torch.equal(found[0][1], found[1][1])
