"""How far each task of the mini stream can be answered without looking: a question-only baseline.

    python recipes/mini/baseline.py

Logistic regression from the words of the prompt (options included) to the answer, fitted on the train part and scored
on the test part like any model. A task is worth having only if tuning gets well above this.
"""

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from mcit.data_prep.mini import rationales, tasks
from mcit.data_prep.schema import Sample
from mcit.eval.scorers import get_scorer


def question_only_answers(train: list[Sample], test: list[Sample]) -> list[str]:
    """One predicted answer for each test sample, from its prompt alone."""
    model = make_pipeline(
        CountVectorizer(analyzer="word", token_pattern=r"\S+", ngram_range=(1, 2)), LogisticRegression(max_iter=500)
    )
    model.fit([s["prompt"][0]["content"] for s in train], [s["references"][0] for s in train])
    return [str(answer) for answer in model.predict([s["prompt"][0]["content"] for s in test])]


def main() -> None:
    for name in rationales.TASKS:
        train, test = (list(getattr(tasks, name)(part)) for part in ("train", "test"))
        scorer = get_scorer({"spatial": "yes_no", "counting": "mcq", "grounding": "bbox"}.get(name, "short"))
        answers = question_only_answers(train, test)
        scores = [scorer.score(answer, s["references"], s) for answer, s in zip(answers, test, strict=True)]
        print(f"{name:12} {sum(scores) / len(scores):5.1f}")


if __name__ == "__main__":
    main()
