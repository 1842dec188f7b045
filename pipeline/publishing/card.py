"""The cards of a publication, from templates and the Hub's own model of their front matter."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mcit.eval.engines.settings import RANKS
from mcit.eval.results import Results

from ..recipe.schema import Recipe
from .config import PublishConfig

if TYPE_CHECKING:
    from .files import Revision

_LIBRARIES = {"adapter": "peft", "merged": "transformers"}  # that load a policy; modules of our own they do not
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=False,  # Markdown; what models said is not in it
)


def model_card(recipe: Recipe, results: Results, revisions: "list[Revision]", config: PublishConfig) -> str:
    """`README.md` of the model: what it is, the matrix, how to load each stage, how to go on, where it is from."""
    base = revisions[-1].base["model"]
    paradigms = dict.fromkeys(stage.train.paradigm for stage in recipe.stages)
    kinds = {kind: [one for one in revisions if one.serving.kind == kind] for kind in ("merged", "extended")}
    data = ModelCardData(
        base_model=base,
        library_name=_LIBRARIES.get(revisions[-1].serving.kind),
        pipeline_tag="image-text-to-text",
        license=config.license,
        datasets=sorted(set(config.datasets.values())) or None,
        tags=["mcit", "continual-learning", *paradigms, *recipe.method],
    )
    return _card(
        data,
        "model.md.j2",
        name=recipe.name,
        results=results,
        revisions=revisions,
        last=revisions[-1],
        merged=kinds["merged"],
        extended=kinds["extended"],
        carried=[one for one in revisions if one.serving.carried],
        base=base,
        repo_id=config.repo_id,
        predictions=f"{config.repo_id}-predictions" if config.predictions else None,
        lineages=list(dict.fromkeys(stage.train.lineage for stage in recipe.stages)),
        paradigms=list(paradigms),
        license=config.license,
        quantization=recipe.base_model.quantization,
        score=_score,
        vllm_rank=_vllm_rank,
    )


def predictions_card(results: Results, files: list[str], config: PublishConfig) -> str:
    """`README.md` of the dataset of predictions, which tells the Hub's viewer what is where."""
    configs = [
        {
            "config_name": task["name"],
            "data_files": [
                {"split": Path(file).stem, "path": file}
                for file in files
                if Path(file).parts[:2] == ("data", task["name"])
            ],
        }
        for task in results["tasks"]
    ]
    data = DatasetCardData(license=config.license, tags=["mcit", "predictions"], configs=configs)
    return _card(data, "predictions.md.j2", DatasetCard, results=results, repo_id=config.repo_id)


def _card(data: Any, template: str, kind: type[ModelCard] | type[DatasetCard] = ModelCard, **values: Any) -> str:
    text = _TEMPLATES.get_template(template).render(**values)
    return str(kind(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n"))


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _vllm_rank(rank: int) -> int:
    """The least that vLLM takes for `--max-lora-rank`."""
    return next((allowed for allowed in RANKS if allowed >= rank), rank)
