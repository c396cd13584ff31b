"""What every object of the API shares: strictness, names, metadata, conditions, and validation with good messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails, PydanticCustomError

from meshctl.api.document import Document, FieldPath, ManifestError, short

API_VERSION: Final = "meshctl.io/v1alpha1"

DNS_LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
DNS_SUBDOMAIN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
LABEL_KEY = r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"
PRODUCT = r"^[A-Za-z0-9]([A-Za-z0-9 ._/-]{0,126}[A-Za-z0-9])?$"

Label = Annotated[str, Field(pattern=DNS_LABEL, max_length=63)]
"""A DNS-1123 label."""
GpuProduct = Annotated[str, Field(pattern=PRODUCT, max_length=128)]
"""A GPU product, as DCGM (`modelName`) or the node label `nvidia.com/gpu.product` writes it."""
ModelName = Annotated[str, Field(min_length=1, max_length=128)]
"""A model, as the inference server names it."""


SET: dict[str, JsonValue] = {"x-kubernetes-list-type": "set"}
"""Of a list: no value twice."""
Unread = Annotated[None, BeforeValidator(lambda _: None)]
"""A field that others use: let through, not kept."""
Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
"""A string in a map, where the API server takes null for an empty one."""


class Strict(BaseModel):
    """Unknown fields are errors, numbers are numbers (no "5", no true) and finite, fields are camelCase. A field that
    is null is one that is not there, as for the API server."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        alias_generator=to_camel,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict) or None not in data.values():
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {name: value for name, value in data.items() if value is not None or name not in known}


class Metadata(Strict):
    """Kubernetes' ObjectMeta: what meshctl reads of it, and the rest let through, so that what `kubectl get -o yaml`
    prints is a valid manifest."""

    name: Annotated[str, Field(pattern=DNS_SUBDOMAIN, max_length=253)]
    namespace: Label = "default"
    labels: dict[Annotated[str, Field(pattern=LABEL_KEY)], Annotated[Text, Field(pattern=LABEL_VALUE)]] = {}
    annotations: dict[Annotated[str, Field(pattern="(?i)" + LABEL_KEY)], Text] = {}
    uid: str = ""
    """"" when it is not from a cluster."""
    generation: int = 0
    deletion_timestamp: str | None = None
    """Since when it is being deleted; None when it is not."""
    creation_timestamp: Annotated[str, BeforeValidator(lambda value: value if isinstance(value, str) else "")] = ""
    """These sort as text. "" when it is not from a cluster."""
    deletion_grace_period_seconds: Unread = None
    finalizers: Unread = None
    generate_name: Unread = None
    managed_fields: Unread = None
    owner_references: Unread = None
    resource_version: Unread = None
    self_link: Unread = None


class ClusterMetadata(Metadata):
    """Of an object that is in no namespace. One that is given is dropped, as the API server does."""

    namespace: Annotated[Literal[""], BeforeValidator(lambda _: "")] = ""


def is_namespaced(kind: type[BaseModel]) -> bool:
    """Whether objects of this kind are in a namespace."""
    return kind.model_fields["metadata"].annotation is not ClusterMetadata


class Condition(Strict):
    """One observation of the object's state, as in Kubernetes."""

    type: Annotated[str, Field(max_length=316)]
    """CamelCase name of the condition, e.g. Ready."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    observed_generation: Annotated[int, Field(ge=0)] | None = None
    """metadata.generation the condition was set for."""
    last_transition_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    """When `status` last changed."""
    reason: Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")]
    """CamelCase code of the cause."""
    message: Annotated[str, Field(max_length=32768)]
    """The cause in words."""


def cel(*rules: tuple[str, str]) -> dict[str, Any]:
    """The schema's part for (CEL rule, message) pairs, which the Kubernetes API server checks."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in rules]}


Conditions = Annotated[
    tuple[Condition, ...],
    Field(
        strict=False,  # of JSON's arrays
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    ),
]


def wrong(message: str, *at: str | int) -> NoReturn:
    """Fail a validator with a message about the field at `at`, relative to what is being validated."""
    raise PydanticCustomError("meshctl", "{reason}", {"reason": message, "at": at})


def repeated(values: Sequence[object]) -> int | None:
    """Index of the first value that stands earlier in the list too."""
    return next((i for i, value in enumerate(values) if value in values[:i]), None)


M = TypeVar("M", bound=BaseModel)


def validated(model: type[M], document: Document) -> M:
    """`document` as a `model`. Raises ManifestError with one Fault per thing wrong, in the order of the text."""
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        faults = [
            document.fault(*_explain(model, details))
            for details in error.errors(include_url=False)
            if not _consequence(details)
        ]
        raise ManifestError(tuple(sorted(faults, key=lambda f: (f.place.line, f.place.column, f.field)))) from error


def _consequence(error: ErrorDetails) -> bool:
    """True of "too few items" in a list that has them: pydantic counts the valid ones, whose faults it reports too."""
    given = error["input"]
    return error["type"] == "too_short" and isinstance(given, list) and len(given) > 0


def _explain(model: type[BaseModel], error: ErrorDetails) -> tuple[FieldPath, str]:
    context = error.get("ctx") or {}
    path: FieldPath = (*error["loc"], *context.get("at", ()))
    value = short(error["input"])
    match error["type"]:
        case "meshctl":
            return path, str(context["reason"])
        case "duration":
            return path, f"{value} {error['msg']}"
        case "extra_forbidden":
            return path, _unknown(model, path)
        case "missing":
            return path, "is required; add it"
        case "model_type" | "dict_type" | "model_attributes_type":
            return path, f"must be a mapping (`field: value`), not {value}"
        case "tuple_type" | "list_type":
            return path, f"must be a list, not {value}"
        case "too_short":
            return path, f"is empty; give at least {context['min_length']}"
        case "too_long":
            return path, f"has too many items; at most {context['max_length']} are taken"
        case "finite_number":
            return path, f"must be a finite number, not {value}"
        case "string_pattern_mismatch":
            return path, f"{value} does not match {context['pattern']}"
        case _:
            message = error["msg"].replace("Input should be", "must be", 1)
            return path, f"{message[0].lower()}{message[1:]}, not {value}"


def _unknown(model: type[BaseModel], path: FieldPath) -> str:
    known = sorted(_fields_at(model, path[:-1]))
    close = difflib.get_close_matches(str(path[-1]), known, n=1)
    return "is not a field here; " + (f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}")


def _fields_at(model: type[BaseModel], path: FieldPath) -> set[str]:
    """Names of the fields of the model found by following `path` from `model`."""
    found = model
    for name in (part for part in path if isinstance(part, str)):
        annotation = next((f.annotation for n, f in found.model_fields.items() if (f.alias or n) == name), None)
        found = next(_models_in(annotation), found)
    return {field.alias or name for name, field in found.model_fields.items()}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
