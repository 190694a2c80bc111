"""Settings that are compared, and their order."""

from jaxtune.planning import fit
from jaxtune.planning.fit import Setting, Trial


def test_settings_keep_the_devices_the_batch_and_whole_heads():
    found = list(fit.settings(8, 16, 2, ("none", "int8")))
    assert len(found) == len(set(found))
    for s in found:
        assert s.data * s.fsdp * s.tensor == 8 and s.tensor in (1, 2)
        assert 16 % (s.data * s.fsdp * s.grad_accum) == 0
    assert {s.remat for s in found} == set(fit.REMAT)
    assert {s.quantize for s in found} == {"none", "int8"}
    # 4 meshes of 8 and 3 of 4 × 2 with 2 or 4 rows a device, 3 remats, 2 storages.
    assert len(found) == (4 * 2 + 3 * 3) * 3 * 2


def test_settings_spread_long_rows_and_experts():
    found = list(fit.settings(8, 4, 1, sequence=fit.row_parts(8192, 8), expert=(1, 2, 4)))
    assert len(found) == len(set(found))
    for s in found:
        assert s.data * s.fsdp * s.tensor * s.sequence * s.expert == 8
        assert 4 % (s.data * s.fsdp * s.expert * s.grad_accum) == 0
    # Four rows do not fill eight devices: each is cut in two.
    assert {s.sequence for s in found} == {2} and {s.expert for s in found} == {1, 2, 4}
    assert fit.lines(found[-1])[0].endswith('"sequence": 2, "expert": 4}')


def test_the_fastest_that_fits_with_a_reserve_comes_first():
    def trial(seconds, size, **changes):
        fields = {"data": 1, "fsdp": 8, "tensor": 1, "grad_accum": 1, "remat": "none"} | changes
        return Trial(Setting(**fields), size, {"compute": seconds, "links": 1.0})

    large, slow = trial(1.0, 950), trial(3.0, 100)
    plain, again, quantised = (
        trial(2.0, 500),
        trial(2.0, 500, remat="block"),
        trial(2.0, 400, quantize="int8"),
    )
    order = fit.ranked([slow, quantised, large, again, plain], 1000)
    assert order == [plain, again, quantised, slow]


def test_lines_are_python():
    config = type("Config", (), {"model": type("Model", (), {})()})()
    for line in fit.lines(Setting(2, 4, 1, 8, "dots", "nf4")):
        exec(line, {"config": config})
    assert config.mesh == {"data": 2, "fsdp": 4, "tensor": 1} and config.grad_accum == 8
    assert (config.model.remat, config.model.quantize) == ("dots", "nf4")
