"""Run specs for HELM in the shapes of FlexGen's seven sub-scenarios and of the adapters beside them, on made-up data."""

import random

from helm.benchmark.adaptation.adapter_spec import AdapterSpec
from helm.benchmark.adaptation.common_adapter_specs import (
    get_generation_adapter_spec, get_language_modeling_adapter_spec, get_multiple_choice_adapter_spec)
from helm.benchmark.augmentations.data_augmenter import DataAugmenterSpec
from helm.benchmark.augmentations.perturbation import PerturbationSpec
from helm.benchmark.metrics.common_metric_specs import get_basic_metric_specs, get_exact_match_metric_specs
from helm.benchmark.metrics.metric import MetricSpec
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import (
    CORRECT_TAG, TEST_SPLIT, TRAIN_SPLIT, VALID_SPLIT, Input, Instance, Output, Reference, Scenario, ScenarioSpec)

NAMES = ["Mia", "Leo", "Anna", "Otto", "Hope", "Vera", "Ruth", "Mark"]
PLACES = ["mill", "harbour", "castle", "forest", "market", "tower"]
KINDS = "helm.benchmark.scenarios"
# Their metrics of harm ask services on the network, so the specs here name the others alone.
OWN = "helm_plugin.Invented"


class Invented(Scenario):
    """Facts, choices and summaries about people and places."""

    name = "tidemill_invented"
    description = "Made up."
    tags = []

    def __init__(self, kind, seed=0):
        super().__init__()
        self.kind = kind
        self.seed = int(seed)

    def get_instances(self, output_path):
        chance = random.Random(f"{self.kind}-{self.seed}")
        return [self.instance(chance, TRAIN_SPLIT if index < 6 else TEST_SPLIT) for index in range(30)]

    def instance(self, chance, split):
        name, place = chance.choice(NAMES), chance.choice(PLACES)
        if self.kind == "text":
            # Some are longer than the model's context: HELM cuts them into windows.
            text = f"Story: {name} lived in a quiet house near the {place}. " * chance.choice([2, 6, 90])
            return Instance(Input(text=text + "“é”"), references=[], split=TEST_SPLIT)
        if self.kind == "summary":
            text = f"{name} went to the {place}. There {name} met {chance.choice(NAMES)} and they walked home."
            return Instance(Input(text=text), [Reference(Output(f"{name} walked to the {place}."), [CORRECT_TAG])], split)
        if self.kind == "fact":
            right = [Reference(Output(f"the {place}"), [CORRECT_TAG]), Reference(Output(place), [CORRECT_TAG])]
            return Instance(Input(text=f"{name} lived near"), right, split)
        others = [other for other in PLACES if other != place][:3]
        choices = chance.sample(others + [place], 4)
        references = [Reference(Output(f"the {one}"), [CORRECT_TAG] if one == place else []) for one in choices]
        return Instance(Input(text=f"{name} lived near the {place}. Where did {name} live?"), references, split)


def invented(kind, **arguments):
    return ScenarioSpec(class_name=OWN, args={"kind": kind, **arguments})


@run_spec_function("tidemill_fact")
def fact(seed):
    adapter = get_generation_adapter_spec(
        output_noun="Answer", max_train_instances=3, max_tokens=8, stop_sequences=["\n"], temperature=1.0, num_outputs=5)
    return RunSpec(f"tidemill_fact:seed={seed}", invented("fact", seed=seed), adapter, get_exact_match_metric_specs())


@run_spec_function("tidemill_joint")
def joint(seed):
    adapter = get_multiple_choice_adapter_spec(
        method="multiple_choice_joint", instructions="Answer.", input_noun="Question", output_noun="Answer",
        max_train_instances=2)
    lower = "helm.benchmark.augmentations.lowercase_perturbation.LowerCasePerturbation"
    augmenter = DataAugmenterSpec(perturbation_specs=[PerturbationSpec(class_name=lower, args={})])
    return RunSpec(f"tidemill_joint:seed={seed}", invented("choice", seed=seed), adapter,
                   get_exact_match_metric_specs(), data_augmenter_spec=augmenter)


@run_spec_function("tidemill_separate")
def separate(method):
    adapter = get_multiple_choice_adapter_spec(
        method=f"multiple_choice_separate_{method}", instructions="", input_noun=None, output_noun=None,
        max_train_instances=0)
    metrics = [MetricSpec(class_name="helm.benchmark.metrics.basic_metrics.BasicReferenceMetric"),
               MetricSpec(class_name="helm.benchmark.metrics.basic_metrics.InstancesPerSplitMetric")]
    return RunSpec(f"tidemill_separate:method={method}", invented("choice"), adapter, metrics)


@run_spec_function("tidemill_pattern")
def pattern(mode):
    spec = ScenarioSpec(f"{KINDS}.synthetic_reasoning_scenario.SyntheticReasoningScenario", {"mode": mode})
    adapter = get_generation_adapter_spec(
        instructions="Please solve the following problem.", output_noun="Target", max_train_instances=5,
        stop_sequences=["\n"], max_tokens=50)
    return RunSpec(f"tidemill_pattern:mode={mode}", spec, adapter, get_exact_match_metric_specs())


@run_spec_function("tidemill_natural")
def natural(difficulty):
    spec = ScenarioSpec(f"{KINDS}.synthetic_reasoning_natural_scenario.SRNScenario", {"difficulty": difficulty})
    adapter = get_generation_adapter_spec(
        instructions="Please solve the following problem.", input_noun="Rules", newline_after_input_noun=True,
        output_noun=None, max_train_instances=3, max_tokens=20)
    names = ["f1_set_match", "iou_set_match", "exact_set_match"]
    return RunSpec(f"tidemill_natural:difficulty={difficulty}", spec, adapter, get_basic_metric_specs(names))


@run_spec_function("tidemill_summary")
def summary(seed):
    adapter = AdapterSpec(
        method="generation", instructions="", input_prefix="### Article: ", input_suffix="\n\n",
        output_prefix="Summarize the above article in 1 sentence.\n", output_suffix="\n###", max_train_instances=2,
        num_outputs=1, max_tokens=64, temperature=0.3, stop_sequences=["###"])
    names = ["rouge_1", "rouge_2", "rouge_l", "f1_score"]
    return RunSpec(f"tidemill_summary:seed={seed}", invented("summary", seed=seed), adapter,
                   get_basic_metric_specs(names))


@run_spec_function("tidemill_text")
def text():
    metrics = [MetricSpec("helm.benchmark.metrics.language_modeling_metrics.LanguageModelingMetric", {"names": []})]
    adapter = get_language_modeling_adapter_spec()
    return RunSpec("tidemill_text", invented("text"), adapter, metrics)
