"""The presets fit the tables as they are published."""

import pytest

from clipkit.tfrecord_tools.tables.presets import PRESETS, fitting_presets

# The columns of the files themselves, as the sources named in presets.py have them.
PUBLISHED = {
    "laion400m": "SAMPLE_ID URL TEXT HEIGHT WIDTH LICENSE NSFW similarity",
    "relaion2b": "url caption similarity hash pwatermark punsafe key status error_message width height original_width "
    "original_height exif md5",
    "relaion-coco": "URL TEXT top_caption all_captions all_similarities WIDTH HEIGHT similarity hash "
    "pwatermark punsafe",
    "datacomp": "uid url text original_width original_height clip_b32_similarity_score clip_l14_similarity_score "
    "face_bboxes sha256",
    "coyo": "id url text width height image_phash text_length word_count num_tokens_bert num_tokens_gpt num_faces "
    "clip_similarity_vitb32 clip_similarity_vitl14 nsfw_score_opennsfw2 nsfw_score_gantman watermark_score "
    "aesthetic_score_laion_v2",
    "cc12m": "url caption",
    "cc3m": "caption url",
}


@pytest.mark.parametrize("name", PRESETS)
def test_all_columns_are_in_the_published_table(name: str) -> None:
    preset, columns = PRESETS[name], PUBLISHED[name].split()
    named = [preset.url, preset.caption, *preset.keep, preset.hash_column]
    assert {each for each in named if each is not None} <= set(columns)
    assert (preset.hash_column is None) == (preset.hash_kind is None)
    assert preset.header in ((), tuple(columns))
    assert fitting_presets(columns)[0] == name or preset.header


def test_headers_of_files_without_one() -> None:
    assert PRESETS["cc12m"].header == ("url", "caption")
    assert PRESETS["cc3m"].header == ("caption", "url")
    assert PRESETS["laion400m"].header == ()
