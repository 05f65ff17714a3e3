"""A packed row computes what its segments compute one by one, in values and in gradients."""

import pytest
import torch
import torch.nn.attention.varlen
from torch import nn

from modeling_llava.acceleration import packed_attention
from modeling_llava.acceleration.packed_attention import NAME, packed_attention_forward, use_packed_attention
from tests.tiny import IMAGE_TOKEN_ID, random_images, text_ids, tiny_model

TILE_TOKENS = 16


def make_rows() -> list[list[int]]:
    """Rows with two, no and one image."""
    image = [IMAGE_TOKEN_ID] * TILE_TOKENS
    return [
        [*text_ids(3), *image, *text_ids(2, seed=1), *image, *text_ids(6, seed=2)],
        text_ids(11, seed=3),
        [*image, *text_ids(4, seed=4)],
    ]


def pack(rows: list[list[int]]) -> dict:
    lengths = [len(row) for row in rows]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = torch.tensor([[token for row in rows for token in row]])
    labels = ids.masked_fill(ids == IMAGE_TOKEN_ID, -100)
    labels[0, bounds[:-1].long()] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def sum_of_losses(model, rows, images) -> torch.Tensor:
    """The loss over all supervised tokens of rows that run one at a time."""
    total, count, start = 0.0, 0, 0
    for row in rows:
        num_images = row.count(IMAGE_TOKEN_ID) // TILE_TOKENS
        pixel_values = images[start : start + num_images] if num_images else None
        start += num_images
        ids = torch.tensor([row])
        labels = ids.masked_fill(ids == IMAGE_TOKEN_ID, -100)
        num_tokens = int((labels[:, 1:] != -100).sum())
        total = total + model(input_ids=ids, pixel_values=pixel_values, labels=labels).loss * num_tokens
        count += num_tokens
    return total / count


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen3", "gemma", "phi"])
def test_loss_and_gradients_are_those_of_the_rows(text):
    rows, images = make_rows(), random_images(3)
    # Sums in another order differ by more than 1e-5 in float32.
    model, images = tiny_model(text=text).double(), images.double()
    expected = sum_of_losses(model, rows, images)
    expected.backward()
    expected_gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    use_packed_attention(model)
    loss = model(**pack(rows), pixel_values=images).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_gradients[name], rtol=1e-5, atol=1e-8, msg=name)


def test_nothing_leaks_between_segments():
    rows, images = make_rows(), random_images(3)
    model = tiny_model()
    use_packed_attention(model)
    with torch.no_grad():
        before = model(**pack(rows), pixel_values=images).logits
        rows[0] = [token if token == IMAGE_TOKEN_ID else token % 200 + 50 for token in rows[0]]
        after = model(**pack(rows), pixel_values=images).logits
    start = len(rows[0])
    assert torch.equal(before[:, start:], after[:, start:])
    assert not torch.equal(before[:, :start], after[:, :start])


def test_no_mask_is_built():
    model = tiny_model()
    use_packed_attention(model)
    seen = []
    attention = model.model.language_model.layers[0].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model(**pack(make_rows()), pixel_values=random_images(3))
    assert seen == [None]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_ordinary_batches_and_generation_are_unchanged(padding_side):
    rows = [text_ids(9), text_ids(5, seed=1)]
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if padding_side == "right" else slice(9 - len(row), 9)
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    model = tiny_model()
    expected = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    use_packed_attention(model)
    assert model.config.text_config._attn_implementation == NAME
    assert model.config.vision_config._attn_implementation != NAME
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected)


def test_window_shorter_than_a_segment_is_refused():
    model = tiny_model(text="mistral")
    model.config.text_config.sliding_window = 8
    for layer in model.model.language_model.layers:
        layer.self_attn.sliding_window = 8
    use_packed_attention(model)
    with pytest.raises(ValueError, match="a segment of 43 tokens for a layer with a window of 8"):
        model(**pack(make_rows()), pixel_values=random_images(3))


def test_language_models_with_an_attention_of_their_own_are_refused():
    with pytest.raises(ValueError, match="got a MptModel for packed rows"):
        use_packed_attention(tiny_model(text="mpt"))


@pytest.mark.parametrize("special", [{"softcap": 50.0}, {"s_aux": torch.zeros(2)}])
def test_attention_that_torch_does_not_compute_is_refused(special):
    inputs = torch.randn(3, 1, 2, 6, 8)
    with pytest.raises(ValueError, match="got a packed row for a Identity with"):
        bounds = torch.tensor([0, 6], dtype=torch.int32)
        packed_attention_forward(nn.Identity(), *inputs, None, cu_seq_lens_q=bounds, max_length_q=6, **special)


def test_under_autocast_all_inputs_have_its_dtype(monkeypatch):
    """A kernel for 16 bits takes no queries that float32 norms and positions have made float32 again."""
    model, seen = tiny_model(text="qwen3"), set()
    use_packed_attention(model)
    attend = packed_attention._attend_one_by_one
    monkeypatch.setattr(
        packed_attention,
        "_attend_one_by_one",
        lambda *args: seen.add(tuple(tensor.dtype for tensor in args[:3])) or attend(*args),
    )
    with torch.autocast("cpu", torch.bfloat16):
        model(**pack(make_rows()), pixel_values=random_images(3))
    assert seen == {(torch.bfloat16,) * 3}


def attend_slowly(query, key, value, bounds, *, scale):
    """Causal attention by its definition, `[T, H, D]`."""
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    places = torch.arange(len(query))
    segments = torch.bucketize(places, bounds[1:], right=True)
    is_seen = (segments[:, None] == segments) & (places[:, None] >= places)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~is_seen, -torch.inf).softmax(-1), value)


def varlen_attn_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert window_size == (-1, 0) and query.shape[1] == key.shape[1]
    return attend_slowly(query, key, value, cu_seq_q, scale=scale)


def varlen_attn_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert window_size == (-1, 0) and enable_gqa
    return attend_slowly(query, key, value, cu_seq_q, scale=scale)


@pytest.mark.parametrize("varlen_attn", [varlen_attn_2_11, varlen_attn_2_13])
@pytest.mark.parametrize("scaling", [None, 0.1])
def test_each_torch_is_told_what_to_compute(monkeypatch, varlen_attn, scaling):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    packed_attention._kernel_shares_heads.cache_clear()
    query, key, value = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    rest = torch.tensor([0, 4, 9], dtype=torch.int32), 5, 0.0, scaling
    expected = packed_attention._attend_one_by_one(query, key, value, *rest)
    torch.testing.assert_close(packed_attention._attend_with_kernel(query, key, value, *rest), expected)
    packed_attention._kernel_shares_heads.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_kernel_on_gpu(text):
    """The kernel is as close to float32 as its dtype of 16 bits is."""
    rows, images = make_rows(), random_images(3)
    model = tiny_model(text=text).cuda()
    use_packed_attention(model)
    batch = {name: value.cuda() if torch.is_tensor(value) else value for name, value in pack(rows).items()}
    expected = model(**batch, pixel_values=images.cuda()).logits
    found = model.bfloat16()(**batch, pixel_values=images.cuda().bfloat16()).logits
    error = (found.float() - expected).norm() / expected.norm()
    assert error < 0.03


@pytest.mark.gpu
@pytest.mark.parametrize("text", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_loss_and_gradients_on_gpu_are_those_of_the_rows(monkeypatch, text, dtype, tolerance):
    """float32 weights, computed with in float32 or, by the kernel, in bfloat16."""
    calls = []
    attend = packed_attention._attend_with_kernel
    monkeypatch.setattr(packed_attention, "_attend_with_kernel", lambda *args: calls.append(1) or attend(*args))
    rows, images = make_rows(), random_images(3).cuda()
    model = tiny_model(text=text).cuda()
    with torch.device("cuda"):
        expected = sum_of_losses(model, rows, images)
    expected.backward()
    expected_gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    use_packed_attention(model)
    batch = {name: value.cuda() if torch.is_tensor(value) else value for name, value in pack(rows).items()}
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = model(**batch, pixel_values=images).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert bool(calls) == (dtype == torch.bfloat16)
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected_gradients[name]).norm() / expected_gradients[name].norm().clamp(min=1e-6)
        # What is summed over many positions in 16 bits is further off.
        assert error < 4 * tolerance, name
