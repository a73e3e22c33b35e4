"""The OpenAPI description is true: schemathesis calls what it describes, rightly and wrongly."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

pytest.importorskip("fastapi")
schemathesis = pytest.importorskip("schemathesis")


def test_it_describes_the_answers(served: Any) -> None:
    with served.client() as client:
        found = client.get("/openapi.json").json()
    assert set(found["paths"]) == {
        "/v1/models",
        "/v1/models/{name}",
        "/v1/completions",
        "/v1/chat/completions",
        "/tokenize",
        "/detokenize",
        "/health",
        "/stats",
        "/metrics",
    }
    for path, operations in found["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
    assert set(found["paths"]["/v1/completions"]["post"]["responses"]) == {
        "200", "400", "401", "404", "408", "413", "429", "500", "503", "504",
    }  # fmt: skip
    assert "HTTPValidationError" not in found["components"]["schemas"]
    assert "security" not in found


def test_the_key_is_described_where_there_is_one(serve: Any) -> None:
    with serve(api_key="k").client(headers={"authorization": "Bearer k"}) as client:
        assert client.get("/openapi.json").json()["security"] == [{"key": []}]


@pytest.mark.slow
def test_schemathesis_finds_nothing(served: Any) -> None:
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis.errors import Unsatisfiable
    from hypothesis.strategies import just
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    wanted = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.response_headers_conformance,
        checks.negative_data_rejection,
        checks.unsupported_method,
    ]
    calm = settings(
        max_examples=20,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for operation in schema.get_all_operations():
        for mode in schemathesis.GenerationMode:
            strategy = operation.ok().as_strategy(generation_mode=mode)

            @seed(7)
            @calm
            @given(case=strategy, mode=just(mode))
            def check(case: Any, mode: Any) -> None:
                if mode is schemathesis.GenerationMode.POSITIVE and "completions" in case.path:
                    case.body |= {"max_tokens": 2, "n": 1}
                    case.body.pop("max_completion_tokens", None)
                    case.body.pop("best_of", None)
                case.call_and_validate(checks=wanted, timeout=20)

            with suppress(Unsatisfiable):  # nothing can be wrong where nothing is asked for
                check()
    assert served.idle()
