-- resolution: 1024
--
-- Midtraining chooses top-down: the domains first, then their images, under stricter floors than pretraining (report, "Midtraining
-- Data"). Edit the three lists; copy this file with `k2 filter --template midtrain > mine.sql`. Concepts are the leaf clusters of
-- the annotation `concepts`: look at their images before you name them here, as K2's people did. The floors still only drop what is
-- poor; no score ranks images, and what a rare domain has is not cut to its best.
WITH terms(topic, term) AS (VALUES -- whole words or phrases in lower case, looked for in captions
  ('text', 'poster'), ('text', 'sign'), ('text', 'logo'), ('text', 'book cover'), ('text', 'letters'), ('text', 'label'),
  ('people', 'portrait'), ('people', 'person'), ('people', 'people'), ('people', 'man'), ('people', 'woman'), ('people', 'child'),
  ('places', 'building'), ('places', 'street'), ('places', 'interior'), ('places', 'landscape'), ('places', 'bridge'),
  ('art', 'painting'), ('art', 'drawing'), ('art', 'illustration'), ('art', 'sculpture'), ('art', 'print')
),
chosen(leaf) AS (VALUES (-1)), -- concepts to take whole, whatever the captions say; -1 is none
dropped(leaf, why) AS (VALUES (-1, 'no such concept')), -- concepts to leave out whole
mentions AS (
  SELECT spoken.uid, count(DISTINCT topic) AS num_topics
  FROM (SELECT uid, ' ' || regexp_replace(lower(caption), '[^\p{L}\p{N}]+', ' ', 'g') || ' ' AS words FROM basics) AS spoken
  JOIN terms ON contains(spoken.words, ' ' || terms.term || ' ')
  GROUP BY spoken.uid
),
artifact_tags AS (
  SELECT fired.uid, count(*) AS num_tags
  FROM (SELECT uid, unnest(codes, recursive := true) FROM artifacts) AS fired
  JOIN tags ON tags.active AND tags.verdict = 'artifact' AND tags.feature = fired.feature AND fired.value > tags.threshold
  GROUP BY fired.uid
)
SELECT
  basics.uid,
  basics.error IS NULL AS decoded, -- 2: nothing can be said about a broken file
  num_topics IS NOT NULL OR chosen.leaf IS NOT NULL AS on_topic, -- top-down: a term in the caption, or a chosen concept
  dropped.leaf IS NULL AS not_dropped, -- 3: concepts that a person has looked at and left out
  concepts.draw < 1.0 * concepts.weight AS not_over_represented, -- 1: frequent concepts are thinned by chance, rare ones stay
  caption_source <> 'name' AS captioned, -- 2: a file name made into words is no caption
  duplicates.representative AS not_duplicate, -- 1: of files that show the same picture, also mirrored, one stays
  semantic.representative OR missing('semantic') AS not_near_duplicate, -- 1: of images with nearly the same content, one stays
  synthetic.real_share > 0.15 AS not_synthetic, -- 5: stricter than in pretraining: what is in doubt goes too
  NOT declared_ai OR missing('provenance') AS not_declared_ai, -- 5: the file itself says that a model made it
  buckets.scale >= 1 AS large_enough, -- 3: an enlarged image teaches softness as if it were detail
  width / height BETWEEN 0.45 AND 2.25 AS aspect_ok, -- 2: little of the picture may be cut away
  laplacian_var < 8000 AS not_noise, -- 3: noise and extreme texture
  rgb_entropy >= 2.2 AS not_flat, -- 3: one colour with little on it
  white_ratio <= 0.6 AS not_white, -- 3: small things on white
  black_ratio <= 0.75 AS not_black, -- 3: small things on black
  greatest(least(border_top, border_bottom), least(border_left, border_right)) <= 0.02 AS no_border, -- 3: frames, letterboxes
  coalesce(jpeg_quality, 100) >= 60 AS not_crushed, -- 3: blocks and mosquito noise
  complexity <= 0.50 AS not_too_complex, -- 4: bytes per pixel as JPEG; only noise needs more at 1024 pixels
  blockiness <= 1.6 OR missing('defects') AS not_blocky, -- 3: 8 x 8 blocks, also under a second save, in a PNG or off the grid
  (banding <= 0.004 AND level_gaps <= 0.8) OR missing('defects') AS not_posterised, -- 3: false contours, or a fifth of the tones left
  combing <= 0.009 OR missing('defects') AS not_interlaced, -- 3: two moments of a video in alternate rows
  greatest(inset_y, inset_x) <= 0.08 OR missing('defects') AS no_inset, -- 3: a picture between bars of its own blur
  clipped_both <= 0.01 OR missing('defects') AS not_oversaturated, -- 3: one channel full where another is empty
  clipped_high <= 0.45 OR clipped_partly <= 0.05 OR missing('defects') AS not_overexposed, -- 3: light that lost its hue; high key stays
  luma_high >= 40 OR missing('defects') AS not_dark, -- 2: hardly a tone to describe; low key has lights
  resampling <= 0.14 OR missing('defects') AS not_enlarged, -- 3: the period that a scaler leaves; blur, grain, soft focus have none
  CASE WHEN boxes IS NOT NULL THEN coalesce(list_sum([b.area FOR b IN boxes IF b.text_height * 1024 < 12]), 0) <= 0.1 END
    OR missing('text_density') AS text_readable, -- 4: a tenth of the image in letters that nobody can read at this resolution
  CASE WHEN artifacts.error IS NULL AND artifacts.uid IS NOT NULL THEN num_tags IS NULL END AS no_artifact_tag -- 3: signed-off SAE features
FROM basics
LEFT JOIN buckets USING (uid)
LEFT JOIN duplicates USING (uid)
LEFT JOIN semantic USING (uid)
LEFT JOIN synthetic USING (uid)
LEFT JOIN provenance USING (uid)
LEFT JOIN defects USING (uid)
LEFT JOIN text_density USING (uid)
LEFT JOIN artifacts USING (uid)
LEFT JOIN artifact_tags USING (uid)
LEFT JOIN concepts USING (uid)
LEFT JOIN chosen ON chosen.leaf = concepts.leaf
LEFT JOIN dropped ON dropped.leaf = concepts.leaf
LEFT JOIN mentions USING (uid)
