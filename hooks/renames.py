"""What releases renamed. Never shortened: a workspace may come from any release."""

from __future__ import annotations

# Old name → new name of a file. It is followed if the old render has the old name and the new one the new.
RENAMED_FILES: dict[str, str] = {
    "finetuning/advice.py": "finetuning/planning/advice.py",
    "finetuning/batches.py": "finetuning/training/batches.py",
    "finetuning/check.py": "finetuning/settings/validation.py",
    "finetuning/cost.py": "finetuning/planning/cost.py",
    "finetuning/dataset.py": "finetuning/preparing/dataset.py",
    "finetuning/estimate.py": "finetuning/planning/memory.py",
    "finetuning/evaluate.py": "finetuning/reporting/evaluate.py",
    "finetuning/int4.py": "finetuning/exporting/int4.py",
    "finetuning/lengths.py": "finetuning/planning/token_counts.py",
    "finetuning/machine.py": "finetuning/planning/hardware.py",
    "finetuning/messages.py": "finetuning/preparing/formats.py",
    "finetuning/model_card.py": "finetuning/reporting/model_card.py",
    "finetuning/model_facts.py": "finetuning/planning/model_facts.py",
    "finetuning/preview.py": "finetuning/planning/plan.py",
    "finetuning/progress.py": "finetuning/training/progress.py",
    "finetuning/record.py": "finetuning/reporting/run_record.py",
    "finetuning/report.py": "finetuning/reporting/report.py",
    "finetuning/rows.py": "finetuning/preparing/rows.py",
    "finetuning/schema.py": "finetuning/settings/allowed.py",
    "finetuning/screen.py": "finetuning/planning/show_plan.py",
    "finetuning/smoke.py": "finetuning/training/smoke.py",
    "finetuning/tiny_model.py": "finetuning/training/tiny_model.py",
    "finetuning/train.py": "finetuning/training/train.py",
    "finetuning/model_card.md": "finetuning/reporting/model_card.md",
    "finetuning/report.html": "finetuning/reporting/report.html",
    "inference/line.py": "inference/request_queue.py",
    "infra/settings.py": "infra/azure_settings.py",
}
# Old name of a file → the other files that took a part of it. An edit goes with the lines around it.
SPLIT_FILES: dict[str, tuple[str, ...]] = {
    "finetuning/check.py": (
        "finetuning/settings/config_file.py",
        "finetuning/settings/run_settings.py",
        "finetuning/planning/plan.py",
        "finetuning/planning/fit.py",
    ),
    "finetuning/dataset.py": (
        "finetuning/preparing/tokens.py",
        "finetuning/preparing/tokenised.py",
        "finetuning/preparing/chat_template.py",
    ),
    "finetuning/estimate.py": ("finetuning/planning/architecture.py", "finetuning/planning/row_lengths.py"),
    "finetuning/export.py": (
        "finetuning/exporting/exported_folder.py",
        "finetuning/exporting/int4.py",
        "finetuning/exporting/merged.py",
        "finetuning/exporting/tuned_model.py",
    ),
    "finetuning/int4.py": ("finetuning/exporting/agreement.py",),
    "finetuning/invoke_olive.py": ("finetuning/settings/startup.py", "finetuning/reporting/show_results.py"),
    "finetuning/messages.py": (
        "finetuning/preparing/turns.py",
        "finetuning/preparing/conversations.py",
        "finetuning/preparing/rejected.py",
    ),
    "finetuning/preparing/conversations.py": ("finetuning/preparing/rejected.py",),
    "finetuning/preparing/dataset.py": ("finetuning/preparing/tokenised.py",),
    "finetuning/preparing/formats.py": ("finetuning/preparing/turns.py",),
    "finetuning/preparing/rows.py": ("finetuning/preparing/data_files.py", "finetuning/preparing/problems.py"),
    "finetuning/preparing/tokens.py": ("finetuning/preparing/chat_template.py",),
    "finetuning/preview.py": ("finetuning/planning/fit.py",),
    "finetuning/record.py": ("finetuning/training/whole_files.py",),
    "finetuning/rows.py": ("finetuning/preparing/data_files.py", "finetuning/preparing/problems.py"),
    "finetuning/train.py": ("finetuning/training/checkpoints.py", "finetuning/training/processes.py"),
    "inference/api.py": ("inference/chat_request.py", "inference/api_error.py"),
    "inference/engine.py": ("inference/load_engine.py", "inference/sources.py"),
    "inference/server.py": ("inference/guard.py",),
    "setup/create_env.py": ("setup/conda_environment.py",),
    "setup/get_model.py": ("setup/hub_download.py",),
    "setup/install.py": ("setup/installed.py",),
}
# File, by its newest name → old name → new name of a setting.
RENAMED_SETTINGS: dict[str, dict[str, str]] = {}
