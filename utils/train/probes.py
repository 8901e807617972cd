"""What is asked of the model beside the steps, read before weights load: sample prompts, MMLU questions."""

from dataclasses import dataclass, field

from utils.arguments import DataArguments, TrainingArguments
from utils.data.sources import load_sample_prompts
from utils.prompts.messages import Messages
from utils.train.mmlu import Question, load_mmlu


@dataclass
class Probes:
    chats: list[Messages] = field(default_factory=list)  # --sample_prompts
    questions: list[Question] = field(default_factory=list)  # MMLU's


def load_probes(training_args: TrainingArguments, data_args: DataArguments) -> Probes:
    """Those that the flags ask for. Raises UserError where a file of them is wrong."""
    return Probes(
        load_sample_prompts(training_args.sample_prompts) if training_args.sample_generate else [],
        load_mmlu(training_args, data_args) if training_args.do_mmlu_eval else [],
    )
