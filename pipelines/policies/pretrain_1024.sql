-- resolution: 1024
--
-- The third phase. The rules of pretrain_256.sql, whose head explains them, with what the resolution moves: size, complexity
-- (only what no picture needs goes), text and compression (strictest; still a floor for the extremely poor, not a choice of the best).
WITH artifact_tags AS (
  SELECT fired.uid, count(*) AS num_tags
  FROM (SELECT uid, unnest(codes, recursive := true) FROM artifacts) AS fired
  JOIN tags ON tags.active AND tags.verdict = 'artifact' AND tags.feature = fired.feature AND fired.value > tags.threshold
  GROUP BY fired.uid
)
SELECT
  basics.uid,
  basics.error IS NULL AS decoded, -- 2: nothing can be said about a broken file
  duplicates.representative AS not_duplicate, -- 1: of files that show the same picture, also mirrored, one stays
  synthetic.real_share > 0.05 AS not_synthetic, -- 5: easier to learn than real ones; 0.05 is the loss of real images of every kind
  NOT declared_ai OR missing('provenance') AS not_declared_ai, -- 5: the file itself says that a model made it
  buckets.scale >= 1 AS large_enough, -- 3: an enlarged image teaches softness as if it were detail
  width / height BETWEEN 0.4 AND 2.5 AS aspect_ok, -- 2: beyond it the crop to 1:2 cuts away what the caption speaks of
  laplacian_var < 12000 AS not_noise, -- 3: noise and extreme texture; nearly all sharp photographs stay below
  rgb_entropy >= 1.5 AS not_flat, -- 3: one colour with little on it
  white_ratio <= 0.75 AS not_white, -- 3: small things on white; they stay where they fill a quarter of the image
  black_ratio <= 0.85 AS not_black, -- 3: small things on black; night skies and stages stay
  rgb_entropy >= 2.2 OR white_ratio + black_ratio > 0.4 AS not_banded, -- 3: so few tones, without a flat background, are banding
  greatest(least(border_top, border_bottom), least(border_left, border_right)) <= 0.05 AS no_border, -- 3: frames, letterboxes
  coalesce(jpeg_quality, 100) >= 40 AS not_crushed, -- 3: blocks and mosquito noise that 1024 pixels show
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
LEFT JOIN synthetic USING (uid)
LEFT JOIN provenance USING (uid)
LEFT JOIN defects USING (uid)
LEFT JOIN text_density USING (uid)
LEFT JOIN artifacts USING (uid)
LEFT JOIN artifact_tags USING (uid)
